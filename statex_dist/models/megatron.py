"""Megatron checkpoints as models of ours: which of our tensors, or rows of them, is which of Megatron's.

Megatron's Mamba layers keep every part of a fused matrix (``z | x | B | C | dt``) as a tensor of its own, so that each
can be cut for tensor parallelism. Names are those of megatron-core 0.16 with its own ``mamba_stack_spec`` (its only
one), whose ``in_proj`` holds the norm before it. Families of which Megatron has no module keep our names; their fused
matrices are taken apart all the same.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from statex_dist.checkpoint.formats.dcp.chunks import Places, Strided
from statex_dist.checkpoint.formats.dcp.reader import DcpSource
from statex_dist.checkpoint.formats.tensor_io import Piece, TensorInfo, TensorSource
from statex_dist.checkpoint.layout import CONFIG_NAME
from statex_dist.errors import CheckpointError
from statex_dist.models.config import ModelConfig
from statex_dist.models.layout import GAIN_NAME, TensorSpec
from statex_dist.models.registry import family_of

logger = logging.getLogger(__name__)

EMBEDDINGS = "embedding.word_embeddings.weight"
FINAL_NORM = "decoder.final_norm.weight"
HEAD = "output_layer.weight"

OTHER_STATE = ("optimizer.", "chained_")
"""How the names of tensors begin that Megatron keeps beside the weights."""


@dataclass(frozen=True, slots=True)
class MegatronPart:
    """Rows ``start .. stop`` of one of our tensors, and the name under which they are a tensor there."""

    name: str
    start: int
    stop: int


NameMap = Mapping[str, tuple[MegatronPart, ...]]
"""The parts of each of our tensors, in order and without gaps, by our name."""


def has_megatron_names(config: ModelConfig) -> bool:
    """Return whether a model gets Megatron's names, not ours."""
    mixed = config.is_mixed or config.attention_layers or config.own_block
    return family_of(config.MODEL_TYPE).megatron is not None and not mixed


def name_map(config: ModelConfig) -> dict[str, tuple[MegatronPart, ...]]:
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
    if place is not None and place[1].endswith(GAIN_NAME):
        raise CheckpointError(
            f"layer {place[0]} has features (op grow_features), of which Megatron's layers of {config.MODEL_TYPE} have "
            "none; write --to hf, zero3 or tp"
        )
    if place is None or place[1] not in layer_names:
        raise CheckpointError(f"tensor '{name}' of a {config.MODEL_TYPE} model has no name in Megatron")
    return f"decoder.layers.{place[0]}.{layer_names[place[1]]}"


def _parts(name: str, spec: TensorSpec) -> tuple[MegatronPart, ...]:
    # Parts that come round after round stay together: cut anywhere between rounds, the tensor is still whole heads.
    if not spec.parts or spec.blocks > 1:
        return (whole(name, spec.shape),)
    found, row = [], 0
    for part, rows in spec.parts:
        found.append(MegatronPart(f"{name}.{part}", row, row + rows))
        row += rows
    return tuple(found)


def whole(name: str, shape: tuple[int, ...]) -> MegatronPart:
    """Return a tensor that is not taken apart."""
    return MegatronPart(name, 0, shape[0] if shape else 1)


def megatron_notes(config: ModelConfig | None) -> list[str]:
    """Return what has to be known about a model's weights before Megatron gets them."""
    if config is None:
        return ["Megatron has no module of this model: tensors keep their names"]
    megatron = family_of(config.MODEL_TYPE).megatron
    if megatron is None or not has_megatron_names(config):
        return [f"Megatron has no module of {config.MODEL_TYPE} models: tensors keep our names"]
    return megatron.notes(config)


def join_parts(source: TensorSource, config: ModelConfig) -> DcpSource:
    """Return a torch distributed checkpoint as the tensors of a model.

    Raises:
        CheckpointError: Parts are missing, left over, or do not fit together.
    """
    assert isinstance(source, DcpSource)
    infos = {name: source.info(name) for name in source.keys()}  # noqa: SIM118 - not a mapping
    made, places, left_out = _joined(infos, source.places, config, source.facts.path)
    if left_out:
        logger.info("%s: %d tensors are not of the model and are left out", source.facts.path, len(left_out))
    return DcpSource(source.facts, made, places, source.archives(), [*source.ignored, *left_out])


def _joined(
    infos: Mapping[str, TensorInfo], places: Places, config: ModelConfig, directory: Path
) -> tuple[dict[str, TensorInfo], Places, list[str]]:
    """Return the tensors of a model and where they lie, from the parts that a checkpoint has of them.

    Returns:
        Tensors by our name, their places, and the names that are left out.

    Raises:
        CheckpointError: Parts are missing, left over, or do not fit together.
    """
    table = name_map(config)
    used = {part.name for parts in table.values() for part in parts}
    if set(table) <= set(infos) or not used & set(infos):
        # The names are ours already, or no tensor is of the model: the caller that needs them reports the missing ones.
        return dict(infos), places, []
    head = family_of(config.MODEL_TYPE).names.head
    if has_megatron_names(config) and head not in table and HEAD in infos:
        table[head] = (whole(HEAD, infos[HEAD].shape),)
        used.add(HEAD)
    left_out = [name for name in infos if name not in used and name.startswith(OTHER_STATE)]
    others = [name for name in infos if name not in used and not name.startswith(OTHER_STATE)]
    if others and has_megatron_names(config):
        raise CheckpointError(
            f"{directory} holds tensor '{others[0]}', unknown to the {config.MODEL_TYPE} model in {CONFIG_NAME}"
        )
    made: dict[str, TensorInfo] = {}
    found: Places = {}
    for name, parts in table.items():
        made[name], found[name] = _join(name, parts, infos, places, directory)
    for name in others:
        made[name], found[name] = infos[name], places[name]
    return made, found, left_out


def _join(
    name: str, parts: Sequence[MegatronPart], infos: Mapping[str, TensorInfo], places: Places, directory: Path
) -> tuple[TensorInfo, list[Piece | Strided]]:
    """Return one tensor and where it lies."""
    if missing := [part.name for part in parts if part.name not in infos]:
        raise CheckpointError(f"{directory} lacks tensor '{missing[0]}', which is needed for '{name}'")
    first = infos[parts[0].name]
    row = math.prod(first.shape[1:])
    found: list[Piece | Strided] = []
    for part in parts:
        info, rows = infos[part.name], part.stop - part.start
        # Megatron fills the vocabulary up, to a multiple of 128 and of the ranks.
        padded = part.name in (EMBEDDINGS, HEAD) and info.shape and info.shape[0] > rows
        if of_part(info, part) != info and not padded:
            raise CheckpointError(
                f"{directory}: tensor '{part.name}' has shape {list(info.shape)}; {rows} rows of '{name}' are expected"
            )
        if info.shape[1:] != first.shape[1:] or info.dtype != first.dtype:
            raise CheckpointError(f"{directory}: the parts of '{name}' differ in shape or dtype")
        for piece in places[part.name]:
            if isinstance(piece, Strided):
                found.append(replace(piece, start=piece.start + part.start * row))
                continue
            shift, end = part.start * row // piece.width, part.stop * row // piece.width
            moved = piece._replace(start=piece.start + shift, stop=min(piece.stop + shift, end))
            found += [moved] if moved.start < moved.stop else []
    shape = (parts[-1].stop, *first.shape[1:]) if first.shape else ()
    return TensorInfo(name=name, shape=shape, dtype=first.dtype), found


def of_part(info: TensorInfo, part: MegatronPart) -> TensorInfo:
    """Return a part of a tensor as a tensor of its own."""
    shape = (part.stop - part.start, *info.shape[1:]) if info.shape else ()
    return TensorInfo(name=part.name, shape=shape, dtype=info.dtype)
