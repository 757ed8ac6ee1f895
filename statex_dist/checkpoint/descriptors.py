"""How many files are open at a time: those last used, within the limit of the process."""

from __future__ import annotations

import contextlib
import os
import resource
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator
from pathlib import Path

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


def open_files_of_reader() -> int:
    """Return how many files one of several readers may keep open: together a fraction of the limit."""
    return min(max(allow_open_files(0) // 32, 2), 32)


def open_files_of_writer(num_files: int) -> int:
    """Return how many files of a target of ``num_files`` may be kept open: about half of the limit."""
    return max(allow_open_files(2 * num_files + 512) // 2 - 16, 4)


class Descriptors:
    """Files that are open for reading and writing; the one that was used longest ago is closed for another.

    Any number of threads may borrow; a file that is borrowed is not closed.

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
                descriptor = self._open[path] = os.open(path, os.O_RDWR)
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
