"""Reading tensors from their pieces, whole or a window of the flattened tensor at a time.

Nothing is mapped (pages of a mapping would count as our memory) and no file is read as a whole. What is read of a
``torch.save`` file is held against the CRCs in its directory on the way.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from statex_dist.checkpoint.formats.crc import CrcLedger
from statex_dist.checkpoint.formats.raw_io import BLOCK_BYTES, FileState, ReadAhead, open_files_of_reader, read_from
from statex_dist.checkpoint.formats.tensor_io import Held, Piece, Pieces, TensorInfo, TensorSource
from statex_dist.errors import CheckpointError

if TYPE_CHECKING:
    from statex_dist.checkpoint.formats.torch_archive.zip import Entry, TorchArchive


from collections.abc import Iterator
from types import TracebackType

import xxhash

from statex_dist.checkpoint.layout import MANIFEST_NAME

SourceRuns = Mapping[str, Mapping[str, Sequence[tuple[int, int, int]]]]
"""Stretches of archives that have been read: ``(start, length, CRC-32)`` of runs, by file and entry."""


_NOWHERE = (0, 0, CrcLedger())


class SourceCrcs:
    """The checksums that the ``torch.save`` files of a source carry, against what is read of them.

    Args:
        archives: The files.
    """

    def __init__(self, archives: Iterable[TorchArchive]):
        self._archives = {archive.path: archive for archive in archives}
        self._entries: dict[Path, list[tuple[int, str, Entry]]] = {}
        for path, archive in self._archives.items():
            stored = [(e.offset, name, e) for name, e in archive.entries.items() if name.startswith("data/") and e.size]
            self._entries[path] = sorted(stored)
        self._ledgers: dict[tuple[Path, str], CrcLedger] = {}
        self._last: dict[Path, tuple[int, int, CrcLedger]] = {}  # begin and end of the storage that was noted last

    def note(self, path: Path, offset: int, data: memoryview) -> None:
        """Note bytes that were read from a file; bytes of files other than the archives are ignored."""
        start, stop, ledger = self._last.get(path, _NOWHERE)
        if not start <= offset < stop:
            if not self._entries.get(path):
                return
            start, entry, ledger = self._of(path, offset)
            stop = start + entry.size
            self._last[path] = start, stop, ledger
        assert offset + len(data) <= stop
        ledger.note(offset - start, data)

    def expect(self, pieces: Pieces) -> None:
        """Have the storages of a tensor checked that is not read now, because an earlier run has copied it."""
        for piece in pieces:
            if isinstance(piece, Piece) and piece.numel and self._entries.get(piece.path):
                self._of(piece.path, piece.offset)

    def _of(self, path: Path, offset: int) -> tuple[int, Entry, CrcLedger]:
        """Return begin, entry and ledger of the storage at a byte of a file."""
        entries = self._entries[path]
        start, name, entry = entries[bisect_right(entries, offset, key=lambda e: e[0]) - 1]
        assert start <= offset
        return start, entry, self._ledgers.setdefault((path, name), CrcLedger())

    def forget(self) -> None:
        """Forget what has been noted: a copy of this process begins to note what it reads itself."""
        self._ledgers.clear()
        self._last.clear()

    def runs(self) -> SourceRuns:
        """Return what has been noted, by file and entry, for :meth:`add_runs` of another process."""
        found: dict[str, dict[str, list[tuple[int, int, int]]]] = {}
        for (path, name), ledger in [*self._ledgers.items()]:
            found.setdefault(str(path), {})[name] = ledger.runs()
        return found

    def add_runs(self, found: SourceRuns) -> None:
        """Note what another process has noted (:meth:`runs`) of the same files."""
        for path, entries in found.items():
            for name, runs in entries.items():
                ledger = self._ledgers.setdefault((Path(path), name), CrcLedger())
                for start, length, crc in runs:
                    ledger.note_crc(start, length, crc)

    def finish(self, *, everything: bool = False, rank: int = 0, world_size: int = 1) -> int:
        """Check every storage of which anything was read; what was left out (padding) is read now.

        Args:
            everything: Whether to check the storages of which nothing was read, too.
            rank: This process among those that have noted or expect the same storages.
            world_size: Their number; each checks its share.

        Returns:
            Number of storages that were checked.

        Raises:
            CheckpointError: A storage is not what was written.
        """
        if everything:
            for path, entries in self._entries.items():
                for _, name, _ in entries:
                    self._ledgers.setdefault((path, name), CrcLedger())
        mine = sorted(self._ledgers)[rank::world_size]
        for path, name in mine:
            entry, state = self._archives[path].entries[name], self._archives[path].state
            check_entry(path, name, entry, self._ledgers[path, name], state)
        return len(mine)


def check_entry(path: Path, name: str, entry: Entry, ledger: CrcLedger, state: FileState | None = None) -> None:
    """Raise unless an archive's entry has the CRC that its directory gives; bytes that are not noted yet are read.

    Raises:
        CheckpointError: The entry has another CRC.
    """
    with path.open("rb", buffering=0) as file:
        for start, stop in ledger.gaps(entry.size):
            for position in range(start, stop, BLOCK_BYTES):
                block = memoryview(bytearray(min(BLOCK_BYTES, stop - position)))
                read_from(file.fileno(), block, entry.offset + position, path=path, expected=state)
                ledger.note(position, block)
    if ledger.total() != entry.crc:
        raise CheckpointError(
            f"{path} is damaged: the CRC-32 of its '{name}' is {ledger.total():08x}; {entry.crc:08x} was written"
        )


_CHUNKS_BYTES, _MOST_CHUNK_BYTES = 16 << 20, 1 << 17
"""Bytes that a reader keeps of all files together, and of one file at most."""
_NO_CHUNK = 0, np.empty(0, dtype=np.uint8)


class PieceReader:
    """Reads windows of tensors; one per thread.

    Args:
        states: What the files of the source were when it was opened; a file that has changed since is refused.
        crcs: Where bytes of ``torch.save`` files are noted; None for nowhere.
        ahead: Fetches ahead for all threads together.
        most_files: Files that are kept open; None for a small part of the limit.
    """

    def __init__(
        self,
        states: Mapping[Path, FileState],
        crcs: SourceCrcs | None = None,
        ahead: ReadAhead | None = None,
        *,
        most_files: int | None = None,
    ):
        self._states, self._crcs = states, crcs
        self._ahead = ahead or ReadAhead(len(states))
        self._files: OrderedDict[Path, int] = OrderedDict()
        self._most_files = most_files or open_files_of_reader()
        self._chunks: dict[Path, tuple[int, np.ndarray]] = {}
        self._chunk_bytes = min(_CHUNKS_BYTES // max(len(states), 1), _MOST_CHUNK_BYTES)
        self._scratch = np.empty(0, dtype=np.uint8)

    def read(
        self, pieces: Pieces, info: TensorInfo, start: int, view: np.ndarray, replicas: Sequence[Piece] = ()
    ) -> None:
        """Fill ``view`` with the bytes of a flattened tensor.

        Args:
            pieces: Where the tensor lies.
            info: The tensor.
            start: First element.
            view: ``[n]`` uint8, whole elements; whole rows where a piece is not of all columns.
            replicas: Where it lies again.

        Raises:
            CheckpointError: A file ends early, cannot be read, or has changed since the source was opened, or a
                replica holds other values.
        """
        item = info.item_bytes
        stop = start + len(view) // item
        for piece in overlapping(pieces, start, stop):
            if isinstance(piece, Held):
                begin, end = max(start, piece.start), min(stop, piece.start + len(piece.data) // item)
                if begin >= end:
                    continue
                data = piece.data[(begin - piece.start) * item : (end - piece.start) * item]
                view[(begin - start) * item : (end - start) * item] = np.frombuffer(data, dtype=np.uint8)
                continue
            if piece.width == 1:
                begin, end = max(start, piece.start), min(stop, piece.stop)
                run = view[(begin - start) * item : (end - start) * item]
                self._fetch(piece.path, piece.offset + (begin - piece.start) * item, run)
                continue
            part, place = window_of(piece, start, view, item)
            if part.flags.c_contiguous:
                self._fetch(piece.path, place, part.reshape(-1))
            else:
                run = self._room(part.size)
                self._fetch(piece.path, place, run)
                part[:] = run.reshape(part.shape)
        for replica in replicas:
            if not overlapping([replica], start, stop):
                continue
            part, place = window_of(replica, start, view, item)
            run = self._room(part.size)
            self._fetch(replica.path, place, run)
            if not np.array_equal(run.reshape(part.shape), part):
                raise CheckpointError(
                    f"tensor '{info.name}': the copy of it in {replica.path} differs from the other ranks' copies"
                )

    def _fetch(self, path: Path, offset: int, run: np.ndarray) -> None:
        size = len(run)
        if not size:
            return
        if 2 * size > self._chunk_bytes:
            self._fetch_from_file(path, offset, run)
        else:
            start, chunk = self._chunks.get(path, _NO_CHUNK)
            if not start <= offset <= start + len(chunk) - size:
                start, chunk = offset, self._fetch_chunk(path, offset, size)
            run[:] = chunk[offset - start : offset - start + size]
        if self._crcs:
            self._crcs.note(path, offset, run.data)

    def _fetch_from_file(self, path: Path, offset: int, run: np.ndarray) -> None:
        descriptor = self._descriptor(path)
        self._ahead.ask(descriptor, path, offset, len(run))
        read_from(descriptor, run.data, offset, path=path, expected=self._states.get(path))

    def _fetch_chunk(self, path: Path, offset: int, size: int) -> np.ndarray:
        """Fetch bytes and those behind them: of a rank's file, the next tensors are there."""
        left = self._states[path].size - offset if path in self._states else size
        chunk = np.empty(max(min(self._chunk_bytes, left), size), dtype=np.uint8)
        self._fetch_from_file(path, offset, chunk)
        self._chunks[path] = offset, chunk
        return chunk

    def _room(self, size: int) -> np.ndarray:
        if len(self._scratch) < size:
            self._scratch = np.empty(size, dtype=np.uint8)
        return self._scratch[:size]

    def _descriptor(self, path: Path) -> int:
        descriptor = self._files.get(path)
        if descriptor is not None:
            self._files.move_to_end(path)
            return descriptor
        if len(self._files) >= self._most_files:
            os.close(self._files.popitem(last=False)[1])
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
        self._files[path] = descriptor
        return descriptor

    def close(self) -> None:
        """Close the files."""
        self._chunks.clear()
        while self._files:
            os.close(self._files.popitem()[1])


def window_of(piece: Piece, start: int, view: np.ndarray, item: int) -> tuple[np.ndarray, int]:
    """Return the part of a window that a piece covers, and the byte of the piece's file at which that part begins.

    Args:
        piece: It overlaps the window.
        start: First element of the window in the flattened tensor.
        view: ``[n]`` uint8: the window; whole rows where the piece is not of all columns.
        item: Bytes of an element.

    Returns:
        ``[rows, bytes]`` uint8, a view; and the byte.
    """
    width, columns = piece.width, piece.last - piece.first
    stop = start + len(view) // item
    if width > 1:
        assert start % width == 0 == stop % width, "windows hold whole rows where a piece is of some columns"
    first, last = max(start // width, piece.start), min(stop // width, piece.stop)
    rows = view.reshape(-1, width * item)[first - start // width : last - start // width]
    part = rows[:, piece.first * item : piece.last * item]
    return part, piece.offset + (first - piece.start) * columns * item


def overlapping(pieces: Pieces, start: int, stop: int) -> Sequence[Piece | Held]:
    """Return the pieces that hold any of the elements ``start .. stop`` of the flattened tensor."""
    if len(pieces) == 1:
        return pieces if _begin(pieces[0]) < stop and _has_after(pieces[0], start) else ()
    last = len(pieces) if stop > _begin(pieces[-1]) else bisect_right(pieces, stop - 1, key=_begin)
    first = bisect_right(pieces, start, hi=last, key=_begin)
    # Before it are the pieces that begin no later than the window: the last of them, and those of equal rows, reach in.
    while first > 0 and _has_after(pieces[first - 1], start):
        first -= 1
    return pieces[first:last]


def _begin(piece: Piece | Held) -> int:
    return piece.start if isinstance(piece, Held) else piece.start * piece.width


def _has_after(piece: Piece | Held, start: int) -> bool:
    return isinstance(piece, Held) or piece.stop * piece.width > start


def blocks(source: TensorSource, name: str, step: int) -> Iterator[np.ndarray]:
    """Yield a tensor's bytes, ``step`` elements at a time; nothing but the files' states is compared."""
    info, pieces = source.info(name), source.pieces(name)
    reader = PieceReader(source.opened, ahead=source.ahead)
    try:
        for start in range(0, info.numel, step):
            window = np.empty(min(step, info.numel - start) * info.item_bytes, dtype=np.uint8)
            reader.read(pieces, info, start, window)
            yield window
    finally:
        reader.close()


class WholeReader:
    """Reads tensors of a source, one after the other; a context manager, which checks what is left at its end.

    Args:
        source: The checkpoint; its facts hold the digests that count.
        crcs: Whether archives are compared with their CRC-32.
    """

    def __init__(self, source: TensorSource, *, crcs: bool = True):
        archives = list(source.archives()) if crcs else []
        self._source, self._crcs = source, SourceCrcs(archives) if archives else None
        self._reader = PieceReader(source.opened, self._crcs, source.ahead)
        self._buffer = np.empty(0, dtype=np.uint8)

    def blocks(self, name: str, out: np.ndarray | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """Yield ``(first element, bytes)`` of the blocks of a flattened tensor, in order.

        Args:
            name: The tensor.
            out: ``[nbytes]`` uint8 in which the blocks are then parts; None reads each into one buffer.

        Raises:
            CheckpointError: The files cannot be read, replicas differ, or the tensor is not that of the manifest.
        """
        info, pieces, replicas = self._source.info(name), self._source.pieces(name), self._source.replicas(name)
        expected = self._source.facts.digests.get(name)
        digest = xxhash.xxh3_128()
        # Where a piece is of some columns, blocks are whole rows.
        width = max((p.width for p in (*pieces, *replicas) if isinstance(p, Piece)), default=1)
        step = max(BLOCK_BYTES // (width * info.item_bytes), 1) * width
        for first in range(0, info.numel, step):
            size = min(step, info.numel - first) * info.item_bytes
            block = self._room(size) if out is None else out[first * info.item_bytes :][:size]
            self._reader.read(pieces, info, first, block, replicas)
            if expected is not None:
                digest.update(block.data)
            yield first, block
        if expected is not None and digest.hexdigest() != expected:
            raise CheckpointError(
                f"{self._source.facts.path} is damaged: the values of tensor '{name}' are not those of its "
                f"{MANIFEST_NAME}"
            )

    def _room(self, size: int) -> np.ndarray:
        if len(self._buffer) < size:
            self._buffer = np.empty(size, dtype=np.uint8)
        return self._buffer[:size]

    def __enter__(self) -> WholeReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._reader.close()
        if kind is None and self._crcs is not None:
            self._crcs.finish()


def same_values(first: TensorSource, first_name: str, second: TensorSource, second_name: str) -> bool:
    """Return whether two tensors have the same shape, dtype and bytes; tied names are not read."""
    if first is second and first.aliases.get(first_name, first_name) == second.aliases.get(second_name, second_name):
        return True
    a, b = first.info(first_name), second.info(second_name)
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    pieces = (*first.pieces(first_name), *second.pieces(second_name))
    width = max((piece.width for piece in pieces if isinstance(piece, Piece)), default=1)
    step = max(BLOCK_BYTES // (width * a.item_bytes), 1) * width
    pairs = zip(blocks(first, first_name, step), blocks(second, second_name, step), strict=True)
    return all(np.array_equal(one, other) for one, other in pairs)
