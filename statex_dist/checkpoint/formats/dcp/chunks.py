"""Opening the chunks of a torch distributed checkpoint: where in the files the values of its tensors lie.

Each chunk is a ``torch.save`` archive inside a larger file, and a box of its tensor. Only their headers are read here,
and everything in them is checked against ``.metadata``.
"""

from __future__ import annotations

import io
import itertools
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from statex_dist.checkpoint.formats.crc import DAMAGE, CrcLedger
from statex_dist.checkpoint.formats.dcp.format import METADATA_NAME, Chunk, StoredTensor
from statex_dist.checkpoint.formats.piece_io import check_entry
from statex_dist.checkpoint.formats.raw_io import FileState
from statex_dist.checkpoint.formats.tensor_io import Held, Piece, TensorInfo
from statex_dist.checkpoint.formats.torch_archive.pickle import TensorRef, UnsafePickleError
from statex_dist.checkpoint.formats.torch_archive.reader import gathered, place_of
from statex_dist.checkpoint.formats.torch_archive.zip import (
    ArchiveError,
    Entry,
    TorchArchive,
    read_content,
    read_entries,
)
from statex_dist.errors import CheckpointError, one_line

_MAX_PICKLE_BYTES = 1 << 20
_HEADER_BYTES = 2048  # of the buffer that reads the headers before and behind a chunk's values


@dataclass(frozen=True, slots=True)
class Tile:
    """A chunk as rows and columns of its tensor, seen as a matrix with rows of ``width`` elements."""

    chunk: Chunk
    start: int
    stop: int
    width: int = 1
    first: int = 0
    last: int = 1


def tiles_of(tensor: StoredTensor, where: Path) -> list[Tile]:
    """Return a tensor's chunks as rows and columns, in the order in which they lie in it.

    Args:
        tensor: The tensor; it may be cut along axis 0, along one further axis, or both.
        where: The file that lists it, for messages.

    Raises:
        CheckpointError: Chunks overlap, leave elements out, or are cut in another way.
    """
    name, shape = tensor.info.name, tensor.info.shape
    chunks = [chunk for chunk in tensor.chunks if chunk.numel]
    cut = {axis for axis in range(1, len(shape)) for chunk in chunks if chunk.sizes[axis] != shape[axis]}
    if len(cut) > 1:
        raise CheckpointError(
            f"{where}: tensor '{name}' of shape {list(shape)} is cut along axes {sorted(cut)}; only axis 0 and one "
            "further axis are read"
        )
    axis = min(cut, default=len(shape))
    width, inner = math.prod(shape[axis:]), math.prod(shape[axis + 1 :])
    found = []
    for chunk in chunks:
        scale = math.prod(shape[1:axis])
        begin, rows = (chunk.offsets[0], chunk.sizes[0]) if shape else (0, 1)
        first, last = (chunk.offsets[axis] * inner, chunk.sizes[axis] * inner) if cut else (0, 1)
        found.append(Tile(chunk, begin * scale, (begin + rows) * scale, width, first, first + last))
    found.sort(key=lambda tile: (tile.start, tile.stop, tile.first))
    held = sum(chunk.numel for chunk in chunks)
    if held < tensor.info.numel:
        raise CheckpointError(f"{where}: the chunks of tensor '{name}' hold {held} of its {tensor.info.numel} elements")
    if held > tensor.info.numel or not _is_grid(found):
        raise CheckpointError(
            f"{where}: the chunks of tensor '{name}' overlap, or do not lie side by side in rows and columns"
        )
    return found


def _is_grid(found: Sequence[Tile]) -> bool:
    """Return whether sorted tiles are bands of rows, one below the other, each cut into columns."""
    row = 0
    for (start, stop), band in itertools.groupby(found, key=lambda tile: (tile.start, tile.stop)):
        column, width = 0, 0
        for tile in band:
            if tile.first != column:
                return False
            column, width = tile.last, tile.width
        if start != row or column != width:
            return False
        row = stop
    return True


@dataclass(frozen=True, slots=True)
class Strided:
    """A chunk whose values do not lie in order: elements ``start`` and on of the flattened tensor."""

    archive: TorchArchive
    tensor: TensorRef
    start: int

    def held(self) -> Held:
        """Return the values, in order."""
        name = f"data/{self.tensor.storage.key}"
        check_entry(self.archive.path, name, self.archive.entries[name], CrcLedger(), self.archive.state)
        return Held(self.start, gathered(self.archive, self.tensor))


Places = dict[str, list[Piece | Strided]]
"""Where tensors lie, by name."""


def open_chunks(directory: Path, tensors: Iterable[StoredTensor]) -> tuple[Places, list[TorchArchive]]:
    """Open every chunk; return where each tensor lies, and one archive per file that holds the storages of its chunks.

    Raises:
        CheckpointError: A file is missing or truncated, or a chunk is not what ``.metadata`` says.
    """
    places: Places = {}
    by_file: dict[str, list[tuple[StoredTensor, Tile, int]]] = {}
    for tensor in tensors:
        tiles = tiles_of(tensor, directory / METADATA_NAME)
        places[tensor.info.name] = [Piece(Path(), 0, 0, 0)] * len(tiles)
        for number, tile in enumerate(tiles):
            by_file.setdefault(tile.chunk.file, []).append((tensor, tile, number))
    archives = []
    for file, chunks in sorted(by_file.items()):
        path, entries, end = directory / file, dict[str, Entry](), 0
        chunks.sort(key=lambda item: item[1].chunk.offset)
        try:
            with path.open("rb", buffering=0) as opened:
                state = FileState.of(os.fstat(opened.fileno()))
                for tensor, tile, number in chunks:
                    chunk, name = tile.chunk, tensor.info.name
                    if chunk.offset < end:
                        raise CheckpointError(f"{path}: the chunk of '{name}' at byte {chunk.offset} overlaps another")
                    if (end := chunk.offset + chunk.length) > state.size:
                        raise CheckpointError(
                            f"{path} is truncated: it has {state.size} bytes; a chunk of '{name}' ends at {end}"
                        )
                    archive = _open_chunk(path, state, opened.fileno(), chunk, tensor.info)
                    places[name][number] = _place(archive, tile, tensor.info)
                    entries[f"data/{len(entries)}"] = archive.storage(archive.content.storage.key)
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing; {METADATA_NAME} lists it") from None
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
        archives.append(TorchArchive(path=path, root="archive", entries=entries, state=state, content=None))
    return places, archives


class _Slice(io.RawIOBase):
    """A part of an open file, read as if it were one."""

    def __init__(self, descriptor: int, offset: int, length: int):
        super().__init__()
        self._descriptor, self._offset, self._length, self._position = descriptor, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        position = offset + (0, self._position, self._length)[whence]
        if position < 0:
            raise ValueError(f"a position of {position} bytes")
        self._position = position
        return position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: max(self._length - self._position, 0)]
        count = os.preadv(self._descriptor, [view], self._offset + self._position) if len(view) else 0
        self._position += count
        return count


def _open_chunk(path: Path, state: FileState, descriptor: int, chunk: Chunk, info: TensorInfo) -> TorchArchive:
    """Return the archive of one chunk, whose content is a tensor of the expected dtype and shape.

    Raises:
        CheckpointError: It is not.
    """
    where = f"{path}: the chunk of '{info.name}' at byte {chunk.offset}"
    # Headers and pickles are at the two ends of the slice; a small buffer reads each of them at once.
    with io.BufferedReader(_Slice(descriptor, chunk.offset, chunk.length), _HEADER_BYTES) as file:
        try:
            root, inside = read_entries(file, chunk.length)
            content = read_content(file, inside, most=_MAX_PICKLE_BYTES)
        except UnsafePickleError as error:
            raise CheckpointError(f"{where} is refused: its pickle needs more: {one_line(error)}") from None
        except ArchiveError as error:
            raise CheckpointError(f"{where} is damaged or not of torch's format: {error.why}") from None
        except DAMAGE as error:
            raise CheckpointError(f"{where} is damaged or not of torch's format: {one_line(error)}") from None
    if not isinstance(content, TensorRef) or (content.dtype, content.shape) != (info.dtype, chunk.sizes):
        found = f"{content.dtype} {list(content.shape)}" if isinstance(content, TensorRef) else "no tensor"
        raise CheckpointError(f"{where} holds {found}; {METADATA_NAME} says {info.dtype} {list(chunk.sizes)}")
    entries = {name: replace(entry, offset=chunk.offset + entry.offset) for name, entry in inside.items()}
    return TorchArchive(path=path, root=root, entries=entries, state=state, content=content)


def _place(archive: TorchArchive, tile: Tile, info: TensorInfo) -> Piece | Strided:
    """Return where a chunk's values lie."""
    tensor: TensorRef = archive.content
    if tensor.is_contiguous:
        place = place_of(archive, tensor)
        return Piece(place.path, place.offset, tile.start, tile.stop, tile.width, tile.first, tile.last)
    if tile.width > 1:
        raise CheckpointError(
            f"{archive.path}: a chunk of tensor '{info.name}' is both transposed and cut by columns; save it contiguous"
        )
    return Strided(archive, tensor, tile.start)
