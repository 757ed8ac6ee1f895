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
from statex_dist.models.mamba2.config import Mamba2Config
from statex_dist.models.registry import family_of

MEGATRON_FAMILIES = ("mamba2", "mamba2_state_spaces")
"""``model_type`` of the families of which megatron-core has a module."""

EMBEDDINGS = "embedding.word_embeddings.weight"
FINAL_NORM = "decoder.final_norm.weight"
HEAD = "output_layer.weight"

MAMBA_LAYER = {
    "norm.weight": "mixer.in_proj.layer_norm_weight",
    "mixer.dt_bias": "mixer.dt_bias",
    "mixer.A_log": "mixer.A_log",
    "mixer.D": "mixer.D",
    "mixer.in_proj.weight": "mixer.in_proj.weight",
    "mixer.in_proj.bias": "mixer.in_proj.bias",
    "mixer.conv1d.weight": "mixer.conv1d.weight",
    "mixer.conv1d.bias": "mixer.conv1d.bias",
    "mixer.norm.weight": "mixer.norm.weight",
    "mixer.out_proj.weight": "mixer.out_proj.weight",
    "mixer.out_proj.bias": "mixer.out_proj.bias",
}
"""Tensors of a Mamba2 layer and their names below ``decoder.layers.{i}.``; biases of projections are not Megatron's."""

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
    return config.MODEL_TYPE in MEGATRON_FAMILIES and not config.is_mixed


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
    names = family_of(config.MODEL_TYPE).names
    norm, head = names.behind_layers
    outside = {names.embeddings: EMBEDDINGS, norm: FINAL_NORM, head: HEAD}
    if name in outside:
        return outside[name]
    place = names.split(name)
    if place is None or place[1] not in MAMBA_LAYER:
        raise CheckpointError(f"tensor '{name}' of a {config.MODEL_TYPE} model has no name in Megatron")
    return f"decoder.layers.{place[0]}.{MAMBA_LAYER[place[1]]}"


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
    if not has_megatron_names(config):
        return [f"Megatron has no module of {config.MODEL_TYPE} models: tensors keep our names"]
    assert isinstance(config, Mamba2Config)
    notes = []
    if config.use_bias:
        notes.append("Megatron's MambaMixer has no bias in its projections; this model has")
    if not config.use_conv_bias:
        notes.append("Megatron's MambaMixer asks for conv1d.bias, which this model has not")
    states = {config.layer_geometry(layer).key_dim for layer in config.recurrent_layers}
    if len(states) > 1:
        notes.append(f"Megatron has one mamba_state_dim for all layers; this model's layers have {sorted(states)}")
    if config.n_groups == 1:
        notes.append("n_groups is 1: Megatron runs the model with tensor parallelism of size 1 only")
    return notes
