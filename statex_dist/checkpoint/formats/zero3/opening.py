"""Opening a ZeRO-3 tag with the weights that lie beside it: those that the trainer gathered when it saved.

Trainer and accelerate write ``model.safetensors`` beside ``latest`` and the tag that it names: rounded weights, or
empty placeholders of them. The tag has more: fp32 master weights, the optimizer's states and the step. It is read if
the others are placeholders or a copy of it; if they are neither, which of the two is meant is not known.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Literal

import numpy as np

from statex_dist.checkpoint.dtypes import CONVERTIBLE, TORCH_NAMES, cast
from statex_dist.checkpoint.formats.piece_io import blocks
from statex_dist.checkpoint.formats.raw_io import BLOCK_BYTES
from statex_dist.checkpoint.formats.registry import Layout, check_ways, ways_to_read
from statex_dist.checkpoint.formats.tensor_io import SourceFacts, TensorInfo, TensorSource
from statex_dist.checkpoint.formats.zero3.layout import looks_like_stage_3, looks_like_zero
from statex_dist.checkpoint.formats.zero3.reader import Zero3Source
from statex_dist.checkpoint.layout import tag_named_in
from statex_dist.errors import CheckpointError


class Zero3(Layout):
    """The layout of DeepSpeed ZeRO stage 3: two files a rank."""

    has_checksums = lists_tensors = True

    @staticmethod
    def detect(directory: Path) -> bool:
        """Return whether a directory holds files of ranks."""
        return looks_like_zero(directory)

    @staticmethod
    def read(directory: Path, facts: SourceFacts, *, describe: bool) -> TensorSource:
        """Open a tag, with the weights that lie beside it.

        Raises:
            CheckpointError: It is damaged, or the weights beside it are those of another model.
        """
        beside = weights_beside(directory)
        # Weights beside it are compared with those of all ranks: what can be done with the model depends on it.
        source = Zero3Source(directory, facts, only_first=describe and beside is None, beside=beside)
        source.has_values = not describe
        if beside is not None:
            source.facts = source.facts.with_notes(settle(source, beside, source.filled))
        if source.filled:
            source.facts = source.facts.with_notes(
                f"saved with exclude_frozen_parameters: {len(source.owned()) - len(source.filled)} of "
                f"{len(source.owned())} tensors are in {directory.name}, the others are read from the weights beside it"
            )
        if source.frozen_excluded:
            source.facts = source.facts.with_notes(
                f"saved with exclude_frozen_parameters: the {len(source.owned())} tensors that are there are not the "
                "whole model if any of its parameters were frozen"
            )
        return source

    @staticmethod
    def precedence(tag: Path) -> Literal["tag", "weights"] | None:
        """Return which is read where weights lie beside a tag: the tag."""
        return "tag" if looks_like_stage_3(tag) else None


def weights_beside(tag: Path) -> TensorSource | None:
    """Open the weights that lie beside a tag, where ``latest`` there names this tag.

    Raises:
        CheckpointError: They are damaged, or there are two that differ.
    """
    directory = tag.parent
    ways = ways_to_read(directory)
    if not ways or tag_named_in(directory) != tag:
        return None
    beside = next(iter(ways.values()))[1](None)
    check_ways(beside, directory)
    return beside


def settle(source: TensorSource, beside: TensorSource, filled: Collection[str]) -> str:
    """Return what has to be said of the weights beside a tag, after comparing them with it.

    Args:
        source: The tag.
        beside: The weights beside it.
        filled: Names that are read from them, and not from the tag.

    Raises:
        CheckpointError: They are another model's, or of another step.
    """
    tag, file = source.facts.path.name, _named(beside)
    empty = 0
    for name in beside.owned():
        if name in filled:
            continue
        info = beside.info(name)
        known = source.info(name) if name in source else None
        if known is not None and info.numel == 0 < known.numel:
            empty += 1
        elif known is None or known.shape != info.shape or not _is_copy(source, known, beside, info):
            shown = name[:80]
            found = f"tensor '{shown}' differs" if known is not None else f"tensor '{shown}' is in {file} alone"
            raise CheckpointError(
                f"{beside.facts.path} holds {file} and the ZeRO checkpoint {tag}, which are not the same model: "
                f"{found}. Move the one that is not meant out of the directory"
            )
    if empty:
        return f"{file} beside {tag} holds {empty} empty placeholders of {len(beside.owned())} tensors: {tag} is read"
    dtypes = ", ".join(sorted({TORCH_NAMES[beside.info(name).dtype] for name in beside.owned()}))
    return f"{file} beside {tag} is a copy of its weights ({dtypes}): {tag} is read"


def _named(beside: TensorSource) -> str:
    return next(iter(ways_to_read(beside.facts.path)))


def _is_copy(source: TensorSource, known: TensorInfo, beside: TensorSource, info: TensorInfo) -> bool:
    """Return whether a tensor equals that of the tag once that is rounded to its dtype."""
    if info.dtype != known.dtype and not {info.dtype, known.dtype} <= set(CONVERTIBLE):
        return False
    step = BLOCK_BYTES // max(known.item_bytes, info.item_bytes)
    pairs = zip(blocks(source, known.name, step), blocks(beside, info.name, step), strict=True)
    return all(_same(cast(ours, known.dtype, info.dtype), theirs, info.dtype) for ours, theirs in pairs)


def _same(ours: np.ndarray, theirs: np.ndarray, dtype: str) -> bool:
    """Return whether two blocks are the same values; a NaN is, whatever its bits."""
    if np.array_equal(ours, theirs) or dtype not in CONVERTIBLE:
        return np.array_equal(ours, theirs)
    a, b = (cast(block, dtype, "F64").view("<f8") for block in (ours, theirs))
    return np.array_equal(a, b, equal_nan=True)
