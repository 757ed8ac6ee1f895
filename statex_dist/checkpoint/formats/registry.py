"""The layouts that are read, one row each; a row's class is imported when a directory holds files of its layout."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from statex_dist.checkpoint.formats.tensor_io import SourceFacts, TensorSource
from statex_dist.checkpoint.layout import PLAIN_STATE_NAME

Open = Callable[[SourceFacts | None], TensorSource]
"""Opens files of a directory; None stands for the facts that the directory itself tells."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """A layout of checkpoints.

    Its class has ``detect(directory) -> bool`` and ``read(directory, facts, *, describe) -> TensorSource``; that of a
    hub layout also ``ways(directory)``: an :data:`Open` by the name of its first file, the preferred one first.

    Attributes:
        name: As manifests and messages call it.
        where: Module and name of its class, with a colon between them.
        marks: Names of files, or patterns: a directory of this layout holds at least one. Messages name the first.
        weights: Endings of the files without which tensors cannot be read.
        is_tag: Whether it is that of a training checkpoint: a tag in the directory of a run.
        of_run: Whether ``config.json`` may lie where a trainer puts it, beside the checkpoint or above.
        is_hub: Whether it is one of the Hugging Face hub. Several of these may lie in one directory if their weights
            are the same.
    """

    name: str
    where: str
    marks: tuple[str, ...]
    weights: tuple[str, ...]
    is_tag: bool = False
    of_run: bool = False
    is_hub: bool = False

    def load(self) -> Any:
        """Import the layout's class."""
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

    def read(self, directory: Path, facts: SourceFacts, *, describe: bool) -> TensorSource:
        """Open a directory of this layout.

        Args:
            directory: The directory with the files.
            facts: What is known of it.
            describe: Whether no tensor will be read.

        Raises:
            CheckpointError: Files are missing, damaged or refused.
        """
        return self.load().read(directory, facts, describe=describe)

    def ways(self, directory: Path) -> dict[str, Open]:
        """Return the files by which a directory of a hub layout can be read, each with its :data:`Open`."""
        return self.load().ways(directory) if self.is_marked(directory) else {}


def load(where: str) -> Any:
    """Import ``module:name``."""
    module, _, name = where.partition(":")
    return getattr(importlib.import_module(module), name)


_HERE = __name__.rpartition(".")[0]
_ROWS = (
    Layout(
        name="hf",
        where=f"{_HERE}.safetensors:Safetensors",
        marks=("model.safetensors", "model.safetensors.index.json"),
        weights=(".safetensors", "model.safetensors.index.json"),
        is_hub=True,
    ),
    Layout(
        name="torch",
        where=f"{_HERE}.torch_archive.reader:Binary",
        marks=("pytorch_model.bin", "pytorch_model.bin.index.json"),
        weights=(".bin", "pytorch_model.bin.index.json"),
        is_hub=True,
    ),
    Layout(
        name="tp",
        where=f"{_HERE}.tensor_parallel:TensorParallel",
        marks=("tp_layout.json",),
        weights=(".safetensors", "tp_layout.json"),
    ),
    Layout(
        name="megatron",
        where=f"{_HERE}.dcp.reader:Dcp",
        marks=(".metadata",),
        weights=(".distcp", ".metadata", "metadata.json", "common.pt"),
        of_run=True,
    ),
    Layout(
        name="plain",
        where=f"{_HERE}.torch_archive.reader:Plain",
        marks=(PLAIN_STATE_NAME,),
        weights=(),
        is_tag=True,
        of_run=True,
    ),
    Layout(
        name="zero3",
        where=f"{_HERE}.zero3.opening:Zero3",
        marks=("zero_pp_rank_*_states.pt", "*_zero_pp_rank_*_states.pt"),
        weights=(),
        is_tag=True,
        of_run=True,
    ),
)
_LAYOUTS = {row.name: row for row in _ROWS}


def layouts() -> tuple[Layout, ...]:
    """Return every layout, those that take precedence first."""
    return tuple(_LAYOUTS.values())


def find_layout(name: str) -> Layout:
    """Return a layout by its name."""
    return _LAYOUTS[name]


def add_layout(layout: Layout) -> None:
    """Register a layout; it comes after those that are there."""
    assert layout.name not in _LAYOUTS, layout.name
    _LAYOUTS[layout.name] = layout
