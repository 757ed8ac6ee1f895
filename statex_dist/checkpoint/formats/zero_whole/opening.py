"""Opening a tag of ZeRO stage 0, 1 or 2 with the weights that lie beside it, by the rules of stage 3."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from statex_dist.checkpoint.formats.registry import Layout
from statex_dist.checkpoint.formats.tensor_io import SourceFacts, TensorSource
from statex_dist.checkpoint.formats.torch_archive.zip import open_archive
from statex_dist.checkpoint.formats.zero3.opening import settle, weights_beside
from statex_dist.checkpoint.formats.zero_whole.files import MODEL_NAME, optim_files, stage_in
from statex_dist.checkpoint.formats.zero_whole.reader import WholeZeroSource
from statex_dist.errors import CheckpointError


class ZeroWhole(Layout):
    """The layout of a stage that keeps the model whole: one file of rank 0, and the optimizer's of each rank."""

    has_checksums = lists_tensors = True
    STAGE: ClassVar[int]

    @classmethod
    def detect(cls, directory: Path) -> bool:
        """Return whether a directory holds a tag of this stage; a damaged one is of stage 2."""
        if not (directory / MODEL_NAME).is_file():
            return False
        try:
            files = optim_files(directory)
            return (stage_in(open_archive(files[0])) if files else 0) == cls.STAGE
        except CheckpointError:
            return cls.STAGE == 2

    @classmethod
    def read(cls, directory: Path, facts: SourceFacts, *, describe: bool) -> TensorSource:
        """Open a tag, with the weights that lie beside it.

        Raises:
            CheckpointError: It is damaged, or the weights beside it are those of another model.
        """
        beside = weights_beside(directory)
        source = WholeZeroSource(directory, facts, beside=beside)
        source.has_values = not describe
        if beside is not None:
            source.facts = source.facts.with_notes(settle(source, beside, source.filled))
        if source.filled:
            source.facts = source.facts.with_notes(
                f"{len(source.filled)} frozen tensors are not in {directory.name}; the weights beside it have them"
            )
        return source

    @classmethod
    def precedence(cls, tag: Path) -> Literal["tag", "weights"] | None:
        """Return which is read where weights lie beside a tag: the tag."""
        return "tag" if cls.detect(tag) else None


class Zero0(ZeroWhole):
    """Stage 0: the optimizer's states are in the file with the model."""

    STAGE = 0


class Zero1(ZeroWhole):
    """Stage 1: optimizer states and master weights are partitioned."""

    STAGE = 1


class Zero2(ZeroWhole):
    """Stage 2: gradients are partitioned too; its files are those of stage 1."""

    STAGE = 2
