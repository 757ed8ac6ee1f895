"""Bytes to and from files at given offsets, without a second copy in memory."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from statex_dist.errors import CheckpointError

BLOCK_BYTES = 4 << 20
"""Size of a buffer: memory is threads times a few of these."""

_READ_AHEAD = 8 * BLOCK_BYTES


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
        os.posix_fadvise(descriptor, offset, len(view) + _READ_AHEAD, os.POSIX_FADV_WILLNEED)
        done = 0
        while done < len(view):
            count = os.preadv(descriptor, [view[done : done + BLOCK_BYTES]], offset + done)
            if not count:
                raise CheckpointError(f"{path} is truncated: it ends at byte {offset + done}, inside a tensor")
            done += count
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


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
