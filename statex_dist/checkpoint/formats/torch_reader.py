"""Tensors of a state dict in one ``torch.save`` file: a plain-engine checkpoint, or a public ``pytorch_model.bin``."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from statex_dist.checkpoint.dtypes import ITEM_BYTES
from statex_dist.checkpoint.formats.raw_io import read_bytes
from statex_dist.checkpoint.formats.tensor_io import Held, Piece, Pieces, SourceFacts, TensorInfo, TensorSource
from statex_dist.checkpoint.formats.torch_zip import TorchArchive, open_archive
from statex_dist.checkpoint.torch_pickle import TensorRef
from statex_dist.errors import CheckpointError


class StateDictSource(TensorSource):
    """A state dict in one file.

    Args:
        path: The file.
        key: Entry of the file that holds the state dict; None where the file is one.
        facts: What is known about the checkpoint.

    Raises:
        CheckpointError: The file is missing, damaged, refused or holds no state dict.
    """

    def __init__(self, path: Path, *, key: str | None, facts: SourceFacts):
        self._archive = open_archive(path)
        content: Any = self._archive.content
        module = content if key is None else content.get(key) if isinstance(content, dict) else None
        if not isinstance(module, dict) or not all(isinstance(v, TensorRef) for v in module.values()):
            raise CheckpointError(f"{path} holds no state dict" + (f" under '{key}'" if key else ""))
        self._tensors: dict[str, TensorRef] = module
        owners: dict[TensorRef, str] = {}
        aliases: dict[str, str] = {}
        for name, tensor in module.items():
            owner = owners.setdefault(tensor, name)
            if owner != name and tensor.numel:
                aliases[name] = owner
        infos = {name: TensorInfo(name=name, shape=t.shape, dtype=t.dtype) for name, t in module.items()}
        super().__init__(facts, infos, [path], aliases=aliases)

    def pieces(self, name: str) -> Pieces:
        """Return where a tensor lies: one run of the file, or, of a transposed one, its values."""
        return whole_pieces(self._archive, self._tensors[name])

    def archives(self) -> Iterable[TorchArchive]:
        """Return the one file."""
        return (self._archive,)


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
