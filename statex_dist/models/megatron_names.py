"""Names of tensors in Megatron checkpoints, as data: which of our tensors, or rows of them, is which of Megatron's.

Megatron's Mamba layers keep every part of a fused matrix (``z | x | B | C | dt``) as a tensor of its own, so that each
can be cut for tensor parallelism. Names are those of megatron-core 0.16 with its own ``mamba_stack_spec`` (its only
one), whose ``in_proj`` holds the norm before it. Families of which Megatron has no module keep our names; their fused
matrices are taken apart all the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from statex_dist.errors import CheckpointError
from statex_dist.models.config import ModelConfig
from statex_dist.models.layout import TensorSpec
from statex_dist.models.registry import family_of

EMBEDDINGS = "embedding.word_embeddings.weight"
FINAL_NORM = "decoder.final_norm.weight"
HEAD = "output_layer.weight"

OTHER_STATE = ("optimizer.", "chained_")
"""How the names of tensors begin that Megatron keeps beside the weights."""


@dataclass(frozen=True, slots=True)
class Part:
    """Rows ``start .. stop`` of one of our tensors, and the name under which they are a tensor there."""

    name: str
    start: int
    stop: int


NameMap = Mapping[str, tuple[Part, ...]]
"""The parts of each of our tensors, in order and without gaps, by our name."""


def has_megatron_names(config: ModelConfig) -> bool:
    """Return whether a model gets Megatron's names, not ours."""
    return family_of(config.MODEL_TYPE).megatron is not None and not config.is_mixed


def name_map(config: ModelConfig) -> dict[str, tuple[Part, ...]]:
    """Return the parts of every tensor of a model, in the family's order; no two parts have the same name.

    Raises:
        CheckpointError: The model has a tensor for which Megatron has no name.
    """
    renamed = has_megatron_names(config)
    found = {}
    for name, spec in family_of(config.MODEL_TYPE).tensors(config).items():
        found[name] = _parts(megatron_name(config, name) if renamed else name, spec)
    names = [part.name for parts in found.values() for part in parts]
    assert len(names) == len(set(names)), "the map has no inverse"
    return found


def megatron_name(config: ModelConfig, name: str) -> str:
    """Return Megatron's name of one of our tensors.

    Raises:
        CheckpointError: It has none.
    """
    family = family_of(config.MODEL_TYPE)
    names, layer_names = family.names, family.megatron.names if family.megatron is not None else {}
    norm, head = names.behind_layers
    outside = {names.embeddings: EMBEDDINGS, norm: FINAL_NORM, head: HEAD}
    if name in outside:
        return outside[name]
    place = names.split(name)
    if place is None or place[1] not in layer_names:
        raise CheckpointError(f"tensor '{name}' of a {config.MODEL_TYPE} model has no name in Megatron")
    return f"decoder.layers.{place[0]}.{layer_names[place[1]]}"


def _parts(name: str, spec: TensorSpec) -> tuple[Part, ...]:
    # Parts that come round after round stay together: cut anywhere between rounds, the tensor is still whole heads.
    if not spec.parts or spec.blocks > 1:
        return (whole(name, spec.shape),)
    found, row = [], 0
    for part, rows in spec.parts:
        found.append(Part(f"{name}.{part}", row, row + rows))
        row += rows
    return tuple(found)


def whole(name: str, shape: tuple[int, ...]) -> Part:
    """Return a tensor that is not taken apart."""
    return Part(name, 0, shape[0] if shape else 1)


def megatron_notes(config: ModelConfig | None) -> list[str]:
    """Return what has to be known about a model's weights before Megatron gets them."""
    if config is None:
        return ["Megatron has no module of this model: tensors keep their names"]
    megatron = family_of(config.MODEL_TYPE).megatron
    if megatron is None or config.is_mixed:
        return [f"Megatron has no module of {config.MODEL_TYPE} models: tensors keep our names"]
    return megatron.notes(config)
