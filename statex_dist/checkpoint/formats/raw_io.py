"""Bytes to and from files at given offsets, without a second copy, and the limit on open files."""

from __future__ import annotations

import contextlib
import os
import resource
import threading
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from statex_dist.errors import CheckpointError, ConfigError

BLOCK_BYTES = 4 << 20
"""Size of a buffer: memory is threads times a few of these."""

_AHEAD_BYTES = 1 << 30
_MOST_AHEAD, _LEAST_AHEAD = 8 << 20, 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class FileState:
    """Identity of a file's contents: it differs if the file is no longer the one that was opened."""

    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, stat: os.stat_result) -> FileState:
        """Return the state of a file."""
        return cls(inode=stat.st_ino, size=stat.st_size, mtime_ns=stat.st_mtime_ns)


def read_from(descriptor: int, view: memoryview, offset: int, *, path: Path, expected: FileState | None = None) -> None:
    """Fill ``view`` with the bytes of an open file from ``offset`` on.

    Args:
        descriptor: The file.
        view: Receives the bytes.
        offset: First byte.
        path: Its path, for the message.
        expected: What the file was; None where any state will do.

    Raises:
        CheckpointError: The file cannot be read, ends before the view is full, or is not as ``expected``.
    """
    try:
        # By its path: a file that was replaced is still open under its old inode.
        if expected is not None and FileState.of(path.stat()) != expected:
            raise CheckpointError(f"{path} changed while it was being read; run again when nothing writes to it")
        done = 0
        while done < len(view):
            count = os.preadv(descriptor, [view[done : done + BLOCK_BYTES]], offset + done)
            if not count:
                raise CheckpointError(f"{path} is truncated: it ends at byte {offset + done}, inside a tensor")
            done += count
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


class ReadAhead:
    """Has the system fetch what will be read next, once: many files are read in turns, a little of each at a time.

    Args:
        num_files: Files that are read in turns; together they are fetched ahead by about a gigabyte.
    """

    def __init__(self, num_files: int):
        self._step = min(max(_AHEAD_BYTES // max(num_files, 1), _LEAST_AHEAD), _MOST_AHEAD)
        self._asked: dict[Path, set[int]] = defaultdict(set)

    def ask(self, descriptor: int, path: Path, offset: int, count: int) -> None:
        """Note that a stretch of a file is about to be read."""
        asked = self._asked[path]
        # Two threads may ask for the same: that costs a call and changes nothing.
        for step in range(offset // self._step, (offset + count) // self._step + 2):
            if step not in asked:
                asked.add(step)
                os.posix_fadvise(descriptor, step * self._step, self._step, os.POSIX_FADV_WILLNEED)


def read_bytes(path: Path, offset: int, count: int) -> bytes:
    """Return ``count`` bytes of a file from ``offset`` on; errors of :func:`read_from`."""
    data = bytearray(count)
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    try:
        read_from(descriptor, memoryview(data), offset, path=path)
    finally:
        os.close(descriptor)
    return bytes(data)


def write_from(view: memoryview | bytes, descriptor: int, offset: int) -> None:
    """Write ``view`` to an open file at ``offset``."""
    done = 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], offset + done)


MOST_OPEN_FILES = 1 << 16


def allow_open_files(wanted: int) -> int:
    """Return how many files this process may have open, at most :data:`MOST_OPEN_FILES`.

    Where ``wanted`` are more, the soft limit is raised as far as the hard one allows.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if _bounded(soft) < min(wanted, _bounded(hard)):
        soft = _bounded(hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return _bounded(soft)


def _bounded(limit: int) -> int:
    return MOST_OPEN_FILES if limit == resource.RLIM_INFINITY else min(limit, MOST_OPEN_FILES)


_OPEN_FILES = "/proc/self/fd"
"""Lists the open files of this process."""

_MOST_OF_READER = 32


def open_files_of_reader() -> int:
    """Return how many files one of several readers may keep open: together a fraction of the limit."""
    return min(max(allow_open_files(0) // 32, 2), _MOST_OF_READER)


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenFileShares:
    """How many files the parts of a tool may keep open.

    Attributes:
        reader: Files of each reader of each thread.
        writer: Files of the target, all threads together.
    """

    reader: int
    writer: int


def share_open_files(num_files: int, *, threads: int, readers: int) -> OpenFileShares:
    """Divide the files that this process may still open among its readers and its writer.

    Args:
        num_files: Files of the target; 0 where nothing is written.
        threads: Threads that read and write.
        readers: Readers that each of them has.

    Raises:
        ConfigError: The limit is too low for this number of threads.
    """
    count = threads * readers
    # A thread opens one more for a moment: to digest a file's directory, or to check an entry.
    apart = len([*Path(_OPEN_FILES).iterdir()]) + threads + 8
    least = count + (threads if num_files else 0)
    limit = allow_open_files(count * _MOST_OF_READER + num_files + apart + 256)
    free = limit - apart
    if free < least:
        raise ConfigError(
            f"--workers {threads} needs {apart + least} open files and the limit is {limit}: raise it with "
            "`ulimit -n`, or give fewer --workers"
        )
    reader = min(max(free // (2 * count), 1), _MOST_OF_READER)
    return OpenFileShares(reader=reader, writer=free - reader * count)


class Descriptors:
    """Files that are open for writing; the one that was used longest ago is closed for another.

    Any number of threads may borrow; a file that is borrowed is not closed. They are not open for reading: then NFS
    sends the very bytes that were written, not whole pages, with which two machines would undo each other's writes.

    Args:
        most: Files to keep open. While more are borrowed at a time, more are open.
    """

    def __init__(self, most: int):
        self._most, self._lock = most, threading.Lock()
        self._open: OrderedDict[Path, int] = OrderedDict()
        self._borrowed: Counter[int] = Counter()  # by descriptor

    @contextlib.contextmanager
    def borrow(self, path: Path) -> Iterator[int]:
        """Give the descriptor of a file that exists."""
        with self._lock:
            descriptor = self._open.get(path)
            if descriptor is None:
                idle = [other for other in self._open if not self._borrowed[self._open[other]]]
                for other in idle[: len(self._open) - self._most + 1]:
                    os.close(self._open.pop(other))
                descriptor = self._open[path] = os.open(path, os.O_WRONLY)
            self._open.move_to_end(path)
            self._borrowed[descriptor] += 1
        try:
            yield descriptor
        finally:
            with self._lock:
                self._borrowed[descriptor] -= 1
                if not self._borrowed[descriptor] and self._open.get(path) != descriptor:
                    os.close(descriptor)  # close() was called while it was borrowed

    def close(self, path: Path) -> None:
        """Close a file if it is open: now, or when those who borrowed it are done."""
        with self._lock:
            descriptor = self._open.pop(path, None)
            if descriptor is not None and not self._borrowed[descriptor]:
                os.close(descriptor)
