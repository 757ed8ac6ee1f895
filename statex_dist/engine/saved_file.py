"""A ``torch.save`` file of a checkpoint, read once into memory: verified, and opened without running its pickle."""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from statex_dist.checkpoint.dtypes import TORCH_NAMES
from statex_dist.checkpoint.formats.crc import DAMAGE
from statex_dist.checkpoint.formats.raw_io import FileState
from statex_dist.checkpoint.formats.torch_archive.pickle import TensorRef, UnsafePickleError, mapped
from statex_dist.checkpoint.formats.torch_archive.reader import gathered
from statex_dist.checkpoint.formats.torch_archive.zip import ArchiveError, TorchArchive, read_content
from statex_dist.checkpoint.manifest import FileRecord
from statex_dist.checkpoint.recorded import BytesView, open_entries, read_recorded
from statex_dist.errors import CheckpointError, one_line


class SavedFile:
    """One file.

    Attributes:
        archive: Its entries and its contents, with tensors as references.

    Args:
        path: The file.
        record: What was written.

    Raises:
        CheckpointError: It is missing, damaged, or its pickle needs more than data.
        OSError: It cannot be read.
    """

    def __init__(self, path: Path, record: FileRecord):
        self._data = read_recorded(path, record)
        try:
            root, entries = open_entries(self._data)
            content = read_content(cast("BinaryIO", BytesView(self._data)), entries)
        except UnsafePickleError as error:
            raise CheckpointError(f"{path} is refused: its pickle needs more than tensors: {one_line(error)}") from None
        except (ArchiveError, *DAMAGE) as error:
            raise CheckpointError(f"{path} is damaged: {one_line(error)}") from None
        state = FileState(inode=0, size=len(self._data), mtime_ns=0)  # nothing is read from the file again
        self.archive = TorchArchive(path=path, root=root, entries=entries, state=state, content=content)

    def tensors(self, value: Any) -> Any:
        """Return a part of the contents with tensors in place of references; they are views of the file's bytes."""
        return mapped(value, lambda item: self._view(item) if isinstance(item, TensorRef) else item)

    def _view(self, tensor: TensorRef) -> torch.Tensor:
        dtype = torch_dtype(tensor.dtype)
        if not tensor.numel:
            return torch.empty(tensor.shape, dtype=dtype)
        offset = self.archive.storage(tensor.storage.key).offset
        storage = torch.frombuffer(self._data, dtype=dtype, count=tensor.storage.numel, offset=offset)
        return storage.as_strided(tensor.shape, tensor.stride, tensor.offset)


def read_tensors(archive: TorchArchive, value: Any) -> Any:
    """Return a part of the contents of a file on disk with its tensors read.

    Raises:
        CheckpointError: The file ends early or cannot be read.
    """

    def read(item: Any) -> Any:
        if not isinstance(item, TensorRef):
            return item
        dtype = torch_dtype(item.dtype)
        data = bytearray(gathered(archive, item))
        return torch.frombuffer(data, dtype=dtype).reshape(item.shape) if data else torch.empty(item.shape, dtype=dtype)

    return mapped(value, read)


def torch_dtype(name: str) -> torch.dtype:
    """Return the dtype that has a name of the safetensors format."""
    dtype: torch.dtype = getattr(torch, TORCH_NAMES[name])
    return dtype
