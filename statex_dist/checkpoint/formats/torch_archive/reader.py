"""Tensors of a state dict in ``torch.save`` files: a plain-engine checkpoint, or a public ``pytorch_model.bin``."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from statex_dist.checkpoint.dtypes import ITEM_BYTES
from statex_dist.checkpoint.formats.places import missing_text
from statex_dist.checkpoint.formats.raw_io import read_bytes
from statex_dist.checkpoint.formats.registry import Layout, Open
from statex_dist.checkpoint.formats.safetensors import check_map, read_index, ways_of
from statex_dist.checkpoint.formats.tensor_io import Held, Piece, Pieces, SourceFacts, TensorInfo, TensorSource
from statex_dist.checkpoint.formats.torch_archive.pickle import TensorRef
from statex_dist.checkpoint.formats.torch_archive.zip import TorchArchive, open_archive
from statex_dist.checkpoint.layout import PLAIN_STATE_NAME
from statex_dist.errors import CheckpointError

logger = logging.getLogger(__name__)


BIN_NAME = "pytorch_model.bin"
BIN_INDEX_NAME = "pytorch_model.bin.index.json"

NESTS = ("state_dict", "model_state_dict", "model", "module")
"""Keys below which training scripts save the state dict, beside other things."""


class StateDictSource(TensorSource):
    """A state dict in one file or several.

    Args:
        files: The files.
        facts: What is known about the checkpoint.
        key: Entry of the file that holds the state dict; None where it is one, or below one of :data:`NESTS`.
        index: Lists which file holds which tensor; None for one file.

    Raises:
        CheckpointError: A file is missing, damaged, refused, holds no state dict, or not what the index says.
    """

    def __init__(self, files: Sequence[Path], *, facts: SourceFacts, key: str | None = None, index: Path | None = None):
        weight_map = None if index is None else read_index(index)
        self._archives: list[TorchArchive] = []
        self._tensors: dict[str, tuple[TorchArchive, TensorRef]] = {}
        owners: dict[tuple[Path, TensorRef], str] = {}
        aliases: dict[str, str] = {}
        for path in files if index is None else _files_of(index, weight_map or {}):
            archive = open_archive(path)
            self._archives.append(archive)
            for name, tensor in _state_dict(archive.content, key, path).items():
                if weight_map is not None and weight_map.get(name) != path.name:
                    raise CheckpointError(f"{path} holds tensor '{name}', which {BIN_INDEX_NAME} does not place there")
                self._tensors[name] = archive, tensor
                owner = owners.setdefault((path, tensor), name)
                if owner != name and tensor.numel:
                    aliases[name] = owner
        if weight_map is not None and index is not None:
            check_map(weight_map, self._tensors, index)
        infos = {n: TensorInfo(name=n, shape=t.shape, dtype=t.dtype) for n, (_, t) in self._tensors.items()}
        super().__init__(facts, infos, [archive.path for archive in self._archives], aliases=aliases)

    @classmethod
    def open(cls, directory: Path, facts: SourceFacts | None = None, *, single: bool | None = None) -> StateDictSource:
        """Open ``pytorch_model.bin``, or shards and their index; arguments as of ``SafetensorsSource``."""
        index = directory / BIN_INDEX_NAME
        facts = facts or SourceFacts.of_directory("torch", directory)
        if single or (single is None and not index.exists()):
            return cls([directory / BIN_NAME], facts=facts)
        return cls([], facts=facts, index=index)

    def stored_pieces(self, name: str) -> Pieces:
        """Return where a tensor lies: one run of a file, or, of a transposed one, its values."""
        return whole_pieces(*self._tensors[name])

    def archives(self) -> Iterable[TorchArchive]:
        """Return the files."""
        return self._archives


def _files_of(index: Path, weight_map: Mapping[str, str]) -> list[Path]:
    """Return the files that an index lists.

    Raises:
        CheckpointError: One is missing.
    """
    files = [index.parent / name for name in dict.fromkeys(weight_map.values())]
    if missing := [path for path in files if not path.is_file()]:
        raise CheckpointError(missing_text(missing[0], index.name))
    return files


def _state_dict(content: Any, key: str | None, path: Path) -> dict[str, TensorRef]:
    """Return the tensors that a file holds; other entries are left out, with a message.

    Raises:
        CheckpointError: There is no state dict, or several.
    """
    held = content if isinstance(content, dict) else {}
    below = [name for name in ([key] if key else NESTS) if _has_tensors(held.get(name))]
    if len(below) > 1:
        raise CheckpointError(
            f"{path} holds several state dicts, under '{below[0]}' and '{below[1]}': save one of them"
        )
    found = held[below[0]] if below else {} if key and held.get(key) != {} else held
    tensors = {name: value for name, value in found.items() if isinstance(value, TensorRef)}
    if not tensors and (found or content != {}):
        raise CheckpointError(f"{path} holds no state dict" + (f" under '{key}'" if key else ""))
    if strange := [name for name in tensors if not isinstance(name, str)]:
        raise CheckpointError(f"{path}: a tensor has the name {str(strange[0])[:80]!r}, which is no text")
    left_out = [str(name)[:80] for name in found if name not in tensors]
    left_out += [str(name)[:80] for name in held if below and not key and name != below[0]]
    if left_out:
        more = f" and {len(left_out) - 3} more" if len(left_out) > 3 else ""
        logger.warning("%s: entries that are no tensors of the model are left out: %s%s", path, left_out[:3], more)
    return tensors


def _has_tensors(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(item, TensorRef) for item in value.values())


def whole_pieces(archive: TorchArchive, tensor: TensorRef) -> Pieces:
    """Return where a tensor of an archive lies: one run, or, of one that is not contiguous, its values."""
    return (place_of(archive, tensor),) if tensor.is_contiguous else (Held(0, gathered(archive, tensor)),)


def place_of(archive: TorchArchive, tensor: TensorRef) -> Piece:
    """Return where a contiguous tensor of an archive lies.

    Raises:
        CheckpointError: It is not contiguous, or its storage is missing or shorter than the pickle says.
    """
    if not tensor.is_contiguous:
        raise CheckpointError(
            f"{archive.path}: a tensor of shape {tensor.shape} is not contiguous, which is not supported"
        )
    return Piece(archive.path, _offset(archive, tensor), 0, tensor.numel)


def _offset(archive: TorchArchive, tensor: TensorRef) -> int:
    """Return the byte of the file at which a tensor begins."""
    entry, item = archive.storage(tensor.storage.key), ITEM_BYTES[tensor.dtype]
    if tensor.storage.numel * item > entry.size:
        raise CheckpointError(
            f"{archive.path} is damaged: its storage {tensor.storage.key} has {entry.size} bytes, "
            f"{tensor.storage.numel * item} are needed"
        )
    return entry.offset + tensor.offset * item


def gathered(archive: TorchArchive, tensor: TensorRef) -> bytes:
    """Return the values of a tensor in order, whatever its strides; the whole tensor is then in memory."""
    first = _offset(archive, tensor)
    item = ITEM_BYTES[tensor.dtype]
    if not tensor.numel:
        return b""
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride, strict=True))
    values = np.frombuffer(read_bytes(archive.path, first, span * item), dtype=f"V{item}")
    strides = [stride * item for stride in tensor.stride]
    return np.lib.stride_tricks.as_strided(values, tensor.shape, strides, writeable=False).tobytes()


class Binary(Layout):
    """The layout of Hugging Face directories with ``pytorch_model.bin``."""

    has_checksums = True

    @staticmethod
    def ways(directory: Path) -> dict[str, Open]:
        """Return the files by which a directory can be read, the one that is taken first."""
        return ways_of(directory, BIN_INDEX_NAME, BIN_NAME, StateDictSource.open)


class Plain(Layout):
    """The layout of a run of one process without DeepSpeed."""

    has_checksums, has_records = True, False

    @staticmethod
    def detect(directory: Path) -> bool:
        """Return whether a directory is such a tag."""
        return (directory / PLAIN_STATE_NAME).is_file()

    @staticmethod
    def read(directory: Path, facts: SourceFacts, *, describe: bool) -> TensorSource:
        """Open a tag."""
        return StateDictSource([directory / PLAIN_STATE_NAME], key="module", facts=facts)
