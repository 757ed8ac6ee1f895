"""Opening a ZeRO-3 tag with the weights that lie beside it."""

from __future__ import annotations

from pathlib import Path

from statex_dist.checkpoint.formats.tensor_io import SourceFacts, TensorSource
from statex_dist.checkpoint.formats.zero3.gathered_weights import settle, weights_beside
from statex_dist.checkpoint.formats.zero3.layout import looks_like_zero
from statex_dist.checkpoint.formats.zero3.reader import Zero3Source


class Zero3:
    """The layout of DeepSpeed ZeRO stage 3: two files a rank."""

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
        if beside is not None:
            source.facts = source.facts.with_notes(settle(source, beside))
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
