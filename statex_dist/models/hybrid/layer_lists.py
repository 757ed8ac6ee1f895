"""Lists of layers in a host's ``config.json``: what each layer is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from statex_dist.errors import CheckpointError, shown

LayerKind = Literal["recurrent", "attention", "both", "other"]
"""How a layer reads the tokens before: by a recurrent state, by keys and values, by both, or not at all."""

Values = Mapping[str, Any]

KINDS: Mapping[str, LayerKind] = {
    "linear_attention": "recurrent",
    "mamba": "recurrent",
    "full_attention": "attention",
    "attention": "attention",
    "mlp": "other",
    "moe": "other",
}
"""Layers by their names in transformers, now and before."""


def kinds_of(key: str, entries: Sequence[str], kinds: Mapping[str, LayerKind] = KINDS) -> list[LayerKind]:
    """Return the kinds of a list (or a text of marks) that stands under ``key``.

    Raises:
        CheckpointError: An entry is none that the host knows.
    """
    if unknown := next((entry for entry in entries if entry not in kinds), None):
        raise CheckpointError(f"config.json: {key} names a layer {shown(unknown)}; allowed: {', '.join(kinds)}")
    return [kinds[entry] for entry in entries]


def listed(values: Values, count: int, *keys: str, kinds: Mapping[str, LayerKind] = KINDS) -> list[LayerKind] | None:
    """Return the kinds of the list that one of these keys holds, or None.

    Raises:
        CheckpointError: Two of the keys hold lists that differ, or an entry is unknown.
    """
    found = {key: kinds_of(key, values[key], kinds) for key in keys if values.get(key) is not None}
    lists = list(found.values())
    if any(other != lists[0] for other in lists):
        raise CheckpointError(f"config.json: {' and '.join(found)} are one setting and differ")
    return lists[0] if lists else None


def every(values: Values, count: int, interval: int) -> list[LayerKind]:
    """Return the kinds where every ``interval``-th layer is attention."""
    return ["recurrent" if (layer + 1) % interval else "attention" for layer in range(count)]
