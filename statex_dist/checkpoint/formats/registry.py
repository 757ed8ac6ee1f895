"""The registry of layouts, one row each; a row's class is imported when a directory holds files of its layout.

A layout is a class that recognises a directory (``detect``), opens it (``read``) and, where it is written too, lays a
target out (``plan_target``). Of the layouts here that last part is a subclass in ``checkpoints_tools/formats``, because
this package knows neither targets nor models.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar, Literal

from statex_dist.checkpoint.formats.piece_io import same_values
from statex_dist.checkpoint.formats.tensor_io import SourceFacts, TensorSource
from statex_dist.checkpoint.layout import FIRST_RANK_FOLDER, PLAIN_STATE_NAME
from statex_dist.errors import CheckpointError, ConfigError

Open = Callable[[SourceFacts | None], TensorSource]
"""Opens files of a directory; None stands for the facts that the directory itself tells."""


class Layout:
    """A layout of checkpoints; a subclass has ``plan_target(request) -> PlannedTarget`` where it is written too.

    Attributes:
        has_checksums: Whether its files carry checksums of their own.
        lists_tensors: Whether its files say which files and tensors there are.
        has_records: Whether its manifests list every weight file.
    """

    has_checksums: ClassVar[bool] = False
    lists_tensors: ClassVar[bool] = False
    has_records: ClassVar[bool] = True

    @classmethod
    def detect(cls, directory: Path) -> bool:
        """Return whether a directory, which holds one of the layout's marks, has this layout."""
        return True

    @classmethod
    def read(cls, directory: Path, facts: SourceFacts, *, describe: bool) -> TensorSource:
        """Open a directory of this layout, of a hub layout by the first of :meth:`ways`.

        Args:
            directory: The directory with the files.
            facts: What is known of it.
            describe: Whether no tensor will be read.

        Raises:
            CheckpointError: Files are missing, damaged or refused.
        """
        return next(iter(cls.ways(directory).values()))(facts)

    @staticmethod
    def ways(directory: Path) -> dict[str, Open]:
        """Return, of a hub layout, an :data:`Open` by the name of its first file, the preferred one first."""
        return {}

    @classmethod
    def precedence(cls, tag: Path) -> Literal["tag", "weights"] | None:
        """Return which is read where weights lie beside a tag; None where it is not known which is meant."""
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class LayoutRow:
    """Properties of a layout that are known before its class is imported.

    Attributes:
        name: Name of the layout in manifests, messages and ``--to``.
        where: Module and name of its class, with a colon between them.
        marks: Names of files, or patterns: a directory of this layout holds at least one. Messages name the first.
        weights: Endings of the files without which tensors cannot be read.
        is_tag: Whether it is that of a training checkpoint: a tag in the directory of a run.
        unnamed: Pattern of the files of a tag that is refused beside weights where ``latest`` does not name it.
        of_run: Whether ``config.json`` may lie where a trainer puts it, beside the checkpoint or above.
        is_hub: Whether it is one of the Hugging Face hub. Several of these may lie in one directory if their weights
            are the same.
        written: Whether it can be written.
        grown: Whether an expansion can be written in it.
        options: Options of ``reshard`` that it takes, beside those that all layouts take.
    """

    name: str
    where: str
    marks: tuple[str, ...]
    weights: tuple[str, ...] = ()
    is_tag: bool = False
    unnamed: str | None = None
    of_run: bool = False
    is_hub: bool = False
    written: bool = False
    grown: bool = False
    options: tuple[str, ...] = ()

    def load(self) -> Any:
        """Import the layout's class, a subclass of :class:`Layout`."""
        return load(self.where)

    def is_marked(self, directory: Path) -> bool:
        """Return whether a directory holds a file of the layout, by names alone."""
        if any("*" not in mark and (directory / mark).exists() for mark in self.marks):
            return True
        patterns = [mark for mark in self.marks if "*" in mark]
        names = [path.name for path in directory.iterdir()] if patterns and directory.is_dir() else []
        return any(fnmatchcase(name, pattern) for pattern in patterns for name in names)

    def detect(self, directory: Path) -> bool:
        """Return whether a directory has this layout."""
        return self.is_marked(directory) and self.load().detect(directory)


def load(where: str) -> Any:
    """Import ``module:name``."""
    module, _, name = where.partition(":")
    return getattr(importlib.import_module(module), name)


_HERE = __name__.rpartition(".")[0]
_ROWS = (
    LayoutRow(
        name="hf",
        where=f"{_HERE}.safetensors:Safetensors",
        marks=("model.safetensors", "model.safetensors.index.json"),
        weights=(".safetensors", "model.safetensors.index.json"),
        is_hub=True,
        written=True,
        grown=True,
        options=("--evaluation", "--tokenizer"),
    ),
    LayoutRow(
        name="torch",
        where=f"{_HERE}.torch_archive.reader:Binary",
        marks=("pytorch_model.bin", "pytorch_model.bin.index.json"),
        weights=(".bin", "pytorch_model.bin.index.json"),
        is_hub=True,
    ),
    LayoutRow(
        name="plain",
        where=f"{_HERE}.torch_archive.reader:Plain",
        marks=(PLAIN_STATE_NAME,),
        is_tag=True,
        of_run=True,
    ),
    LayoutRow(
        name="zero3",
        where=f"{_HERE}.zero3.opening:Zero3",
        marks=("zero_pp_rank_*_states.pt", "*_zero_pp_rank_*_states.pt", FIRST_RANK_FOLDER),
        is_tag=True,
        unnamed="zero_pp_rank_*_mp_rank_*_model_states.pt",
        of_run=True,
        written=True,
        grown=True,
        options=("--world-size",),
    ),
    *(
        LayoutRow(
            name=f"zero{stage}",
            where=f"{_HERE}.zero_whole.opening:Zero{stage}",
            marks=("mp_rank_00_model_states.pt",),
            is_tag=True,
            of_run=True,
        )
        for stage in (0, 1, 2)
    ),
    LayoutRow(
        name="tp",
        where=f"{_HERE}.tensor_parallel:TensorParallel",
        marks=("tp_layout.json",),
        weights=(".safetensors", "tp_layout.json"),
        written=True,
        options=("--tp",),
    ),
    LayoutRow(
        name="megatron",
        where=f"{_HERE}.dcp.reader:Dcp",
        marks=(".metadata",),
        weights=(".distcp", ".metadata", "metadata.json", "common.pt"),
        of_run=True,
        written=True,
    ),
)
_LAYOUTS = {row.name: row for row in _ROWS}


def layouts() -> tuple[LayoutRow, ...]:
    """Return every layout, those that take precedence first."""
    return tuple(_LAYOUTS.values())


def find_layout(name: str) -> LayoutRow:
    """Return a layout by its name."""
    return _LAYOUTS[name]


def is_of_training(name: str) -> bool:
    """Return whether a layout, if there is one of that name, is that of a training checkpoint."""
    return name in _LAYOUTS and _LAYOUTS[name].is_tag


def add_layout(row: LayoutRow) -> None:
    """Register a layout; it comes after those that are there.

    Raises:
        ConfigError: Another layout has its name.
    """
    if row.name in _LAYOUTS:
        raise ConfigError(f"a layout {row.name!r} is registered already")
    _LAYOUTS[row.name] = row


def ways_to_read(directory: Path) -> dict[str, tuple[str, Open]]:
    """Return the files by which a model directory can be read, the one that is taken first, with layout and opener.

    An index comes before a single file, safetensors before ``.bin``. A file that its index lists is no other way.
    """
    on_hub = [row for row in layouts() if row.is_hub and row.is_marked(directory)]
    return {name: (row.name, opener) for row in on_hub for name, opener in row.load().ways(directory).items()}


def check_ways(first: TensorSource, directory: Path) -> None:
    """Raise if a model directory holds further weights that are not those that are read.

    Raises:
        CheckpointError: It does; both files are named.
    """
    taken, *others = ways_to_read(directory)
    for name in others:
        end = f"keep the one that is the model, and move the other away from {directory}"
        try:
            other = ways_to_read(directory)[name][1](None)
        except CheckpointError as error:
            raise CheckpointError(
                f"{directory} holds {taken} and also {name}, which cannot be read: {str(error)[:160]}"
            ) from None
        if difference := _difference(first, other):
            raise CheckpointError(f"{taken} and {name} hold different weights: {difference}; {end}")


def _difference(first: TensorSource, second: TensorSource) -> str | None:
    """Return how the tensors of two sources differ, or None; a tied tensor may have one name in one of them."""
    for one, other in ((first, second), (second, first)):
        for name in one.owned():
            group = [name, *(alias for alias, owner in one.aliases.items() if owner == name)]
            if not any(member in other for member in group):
                return f"'{name}' is in one of them alone"
    for name in first.keys():  # noqa: SIM118 - not a mapping
        if name not in second:
            continue
        a, b = first.info(name), second.info(name)
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            return f"'{name}' is {a.dtype} {list(a.shape)} in one, {b.dtype} {list(b.shape)} in the other"
        if not same_values(first, name, second, name):
            return f"the values of '{name}' differ"
    return None
