"""Counts of the keys and values that a host's attention layers keep of each token, as we hold them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from statex_dist.errors import CheckpointError, shown
from statex_dist.models.config import LARGEST_SIZE, check_type
from statex_dist.models.hybrid.layer_lists import Values

CountElements = Callable[[Values], int]
"""Takes the file's values; returns the numbers that one attention layer keeps of a token."""


def whole(values: Values, key: str, default: int) -> int:
    """Return a size of the file, or the default where the file has none.

    Raises:
        CheckpointError: It is no size.
    """
    value: Any = values.get(key)
    if value is None:
        return default
    check_type(key, value, int)
    if not 1 <= value <= LARGEST_SIZE:
        raise CheckpointError(f"config.json: {key} must be 1 or more and at most {LARGEST_SIZE}, not {shown(value)}")
    return int(value)


def grouped(heads: int, key_values: int | None, size: int | None = None, *, width: int = 1) -> CountElements:
    """Return the count where groups of heads share keys and values.

    Args:
        heads: transformers' default of ``num_attention_heads``.
        key_values: The same of ``num_key_value_heads``; None is as many as heads.
        size: The same of ``head_dim``; None is the width shared among the heads.
        width: Channels that the heads share, as a multiple of the model's width.
    """

    def count(values: Values) -> int:
        num_heads = whole(values, "num_attention_heads", heads)
        # A file that says null has a key for each head, whatever the default.
        groups = num_heads if key_values is None or values.get("num_key_value_heads", 0) is None else key_values
        each = size or width * values["hidden_size"] // num_heads
        head_dim = each if width > 1 else whole(values, "head_dim", each)  # Zamba2 computes it
        return 2 * whole(values, "num_key_value_heads", groups) * head_dim

    return count


def latent(values: Values) -> int:
    """Return the count of Kimi-Linear's latent attention: keys and values of every head, made of the latent ones."""
    keys = whole(values, "qk_nope_head_dim", 128) + whole(values, "qk_rope_head_dim", 64)
    return whole(values, "num_attention_heads", 32) * (keys + whole(values, "v_head_dim", 128))
