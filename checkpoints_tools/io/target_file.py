"""One file of a target: how it is laid out, and the file while its tensors come, in any order, from several threads."""

from __future__ import annotations

import contextlib
import os
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from checkpoints_tools.io.journal import PARTIAL_SUFFIX, TargetJournal
from checkpoints_tools.io.tensor_stream import TensorJob
from statex_dist.checkpoint.formats.crc import CrcLedger, crc_of_zeros, directory_digest
from statex_dist.checkpoint.formats.raw_io import BLOCK_BYTES, Descriptors, read_from, write_from
from statex_dist.checkpoint.formats.tensor_io import Piece
from statex_dist.checkpoint.manifest import FileRecord, digest_file

FileRuns = dict[int, list[tuple[int, int, int]]]
"""Checksums of the bytes that are written into a file: ``(start, length, CRC-32)`` by the offset of the storage."""


class Archive(Protocol):
    """Properties of a ``torch.save`` archive that are known before its storages are written."""

    @property
    def storages(self) -> Mapping[str, tuple[int, int]]:
        """Byte offset and size of each storage, by key."""

    @property
    def fixed(self) -> tuple[tuple[int, bytes], ...]:
        """``(offset, bytes)`` of everything but the storages."""

    def closing(self, crcs: Mapping[str, int]) -> list[tuple[int, bytes]]:
        """Return ``(offset, bytes)`` of what depends on the storages' CRCs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetFile:
    """One file that is to be written.

    Attributes:
        name: Path relative to the target.
        size: Bytes.
        header: What stands before the values.
        archives: Where ``torch.save`` archives begin in it, and what lays them out. The layouts hold pickles and are
            made when they are needed: of a thousand files only a few are in memory.
        storages: Offset and size of every storage of its archives.
    """

    name: str
    size: int
    header: bytes = b""
    archives: tuple[tuple[int, Callable[[], Archive]], ...] = ()
    storages: tuple[tuple[int, int], ...] = ()

    def record(self, path: Path) -> FileRecord:
        """Return the record of the file, which is complete at ``path``."""
        if [base for base, _ in self.archives] == [0]:
            # An archive's checksums are known already: to read it again would cost as much as to write it.
            return FileRecord(size=self.size, directory_xxh3_128=directory_digest(path))
        return FileRecord(size=self.size, xxh3_128=digest_file(path))


class OpenFile:
    """One file while it is written."""

    def __init__(self, layout: TargetFile, journal: TargetJournal, descriptors: Descriptors):
        self.layout, self._descriptors = layout, descriptors
        self._final = journal.directory / layout.name
        self._partial = journal.directory / (layout.name + PARTIAL_SUFFIX)
        self._finished = journal.tensors.keys()
        self._lock, self._is_made, self._is_dirty = threading.Lock(), False, False
        self._missing = 0
        self._written: list[tuple[TensorJob, Piece]] = []
        self._storages = sorted(layout.storages)
        self._ledgers = {offset: CrcLedger() for offset, _ in self._storages}
        self._due = {offset: 0 for offset, _ in self._storages}

    def expect(self, job: TensorJob, place: Piece) -> None:
        """Note a place that a tensor has in the file; an earlier run may have written it."""
        if self._storages:
            self._due[self._storage_at(place.offset)] += place.numel * job.info.item_bytes
        if job.key in self._finished:
            self._written.append((job, place))

    def await_tensor(self) -> None:
        """Note that one more tensor has to be written before the file is complete."""
        self._missing += 1

    @property
    def lacks_tensors(self) -> bool:
        """Whether any tensor has still to be written."""
        return self._missing > 0

    def _storage_at(self, offset: int) -> int:
        return self._storages[bisect_right(self._storages, offset, key=lambda storage: storage[0]) - 1][0]

    def make(self) -> None:
        """Make the file on the first call: headers written, all its space reserved."""
        if self._is_made:
            return
        with self._lock:
            if self._is_made:
                return
            self._partial.parent.mkdir(parents=True, exist_ok=True)
            keep = 0 if self._written else os.O_TRUNC
            os.close(os.open(self._partial, os.O_CREAT | keep | os.O_WRONLY, 0o666))
            with self._descriptors.borrow(self._partial) as descriptor:
                os.posix_fallocate(descriptor, 0, self.layout.size)
                write_from(self.layout.header, descriptor, 0)
                for base, lay_out in self.layout.archives:
                    for offset, data in lay_out().fixed:
                        write_from(data, descriptor, base + offset)
            self._count_written()
            self._is_made = self._is_dirty = True

    def is_made_elsewhere(self, *, count: bool = False) -> None:
        """Take the file as it lies there, because another process has made it.

        Args:
            count: Whether to note the checksums of the bytes of an earlier run.
        """
        if count:
            self._count_written()
        self._is_made = True

    def runs(self) -> FileRuns:
        """Return the checksums of the written bytes, by storage, for :meth:`add_runs` of another process."""
        return {offset: runs for offset, ledger in self._ledgers.items() if (runs := ledger.runs())}

    def add_runs(self, found: FileRuns) -> None:
        """Note what another process has written (:meth:`runs`)."""
        for offset, runs in found.items():
            for start, length, crc in runs:
                self._ledgers[offset].note_crc(start, length, crc)

    def forget(self) -> None:
        """Forget the checksums: a copy of this process begins to note what it writes itself."""
        self._ledgers = {offset: CrcLedger() for offset in self._ledgers}

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        """Give the descriptor of the file, made if it was not there."""
        self.make()
        with self._descriptors.borrow(self._partial) as descriptor:
            yield descriptor

    def _count_written(self) -> None:
        """Read again what an earlier run wrote, and note its checksums."""
        if not self._storages or not self._written:
            return
        with self._partial.open("rb", buffering=0) as file:
            self._count(file.fileno())

    def _count(self, descriptor: int) -> None:
        block = bytearray(BLOCK_BYTES)
        for job, place in self._written:
            stop = place.offset + place.numel * job.info.item_bytes
            for offset in range(place.offset, stop, BLOCK_BYTES):
                view = memoryview(block)[: min(BLOCK_BYTES, stop - offset)]
                read_from(descriptor, view, offset, path=self._partial)
                self._note(offset, view)

    def _note(self, offset: int, data: memoryview) -> None:
        start = self._storage_at(offset)
        self._ledgers[start].note(offset - start, data)

    def write(self, offset: int, data: memoryview) -> None:
        """Write values at a place that no other tensor has."""
        with self._opened() as descriptor:
            write_from(data, descriptor, offset)
        self._is_dirty = True
        if self._storages:
            self._note(offset, data)

    def done_with_tensors(self, count: int) -> bool:
        """Note that tensors are in the file; return whether they were the last ones that the file lacked."""
        self.make()  # a tensor without elements has not opened it
        with self._lock:
            self._missing -= count
            return self._missing == 0

    def sync(self) -> None:
        """Flush what has been written."""
        # A file that is finished is flushed, and has another name.
        with contextlib.suppress(FileNotFoundError):
            if self._is_dirty:
                self._is_dirty = False  # later writes are not flushed by this
                with self._descriptors.borrow(self._partial) as descriptor:
                    os.fsync(descriptor)

    def finish(self) -> FileRecord:
        """Complete, flush and digest the file and give it its final name."""
        with self._opened() as descriptor:
            for base, lay_out in self.layout.archives:
                archive = lay_out()
                crcs = {key: self._crc(base + offset, size) for key, (offset, size) in archive.storages.items()}
                for offset, data in archive.closing(crcs):
                    write_from(data, descriptor, base + offset)
            with ThreadPoolExecutor(max_workers=1, thread_name_prefix="flush") as flusher:
                flushed = flusher.submit(os.fsync, descriptor)
                record = self.layout.record(self._partial)
                flushed.result()
        self.close()
        self._partial.replace(self._final)
        return record

    def _crc(self, start: int, size: int) -> int:
        """Return the CRC of a storage; bytes that were not written are padding, which the file system has as zeros."""
        ledger = self._ledgers[start]
        gaps = ledger.gaps(size)
        padding = sum(stop - begin for begin, stop in gaps)
        assert size - padding == self._due[start], f"{self.layout.name}: {size - padding} of {self._due[start]} bytes"
        for begin, stop in gaps:
            ledger.note_crc(begin, stop - begin, crc_of_zeros(stop - begin))
        return ledger.total()

    def close(self) -> None:
        """Close the file, finished or not."""
        self._descriptors.close(self._partial)
