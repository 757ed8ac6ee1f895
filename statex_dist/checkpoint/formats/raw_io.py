"""Bytes to and from files at given offsets, without a second copy in memory."""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from statex_dist.errors import CheckpointError

BLOCK_BYTES = 4 << 20
"""Size of a buffer: memory is threads times a few of these."""

_AHEAD_BYTES = 1 << 30
_MOST_AHEAD, _LEAST_AHEAD = 8 << 20, 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class FileState:
    """What tells that a file is still the one that was opened."""

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
