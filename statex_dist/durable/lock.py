"""File locks that end with the process that holds them, however it ends.

This is ``flock``: the kernel drops it when the process is gone, so no lock is ever stale, and on NFS and other shared
file systems it holds between machines. A file may say who holds its lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
import time
from pathlib import Path
from typing import ClassVar

logger = logging.getLogger(__name__)

_HOLDER_BYTES = 4096


class LockHeldError(Exception):
    """Another process holds the lock.

    Attributes:
        path: What is locked.
        holder: What its holder wrote into it, such as ``a run (process 12 on host-a)``; empty if nothing.
    """

    def __init__(self, path: Path, holder: str = ""):
        super().__init__(f"{path} is locked by {holder or 'another process'}")
        self.path, self.holder = path, holder


class HeldLock:
    """A lock that this process, and no child of it, holds until :meth:`release`; a context manager."""

    _all: ClassVar[set[HeldLock]] = set()

    def __init__(self, descriptor: int):
        self._descriptor: int | None = descriptor
        self._all.add(self)

    def __enter__(self) -> HeldLock:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def release(self) -> None:
        """Let others have the lock; a second call does nothing."""
        if self._descriptor is not None:
            # Not only closed: a child that was forked in between has the open file too.
            with contextlib.suppress(OSError):
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            self._close()

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        self._all.discard(self)
        if descriptor is not None:
            os.close(descriptor)

    @classmethod
    def leave_to_parent(cls) -> None:
        """Close the parent's locks in a child that was just forked: they are to end with the parent."""
        for lock in [*cls._all]:
            lock._close()


os.register_at_fork(after_in_child=HeldLock.leave_to_parent)


def acquire(
    path: Path,
    *,
    directory: bool = False,
    shared: bool = False,
    create: bool = True,
    wait: float = 0.0,
    poll: float = 0.1,
    holder: str = "",
    required: bool = True,
) -> HeldLock:
    """Lock a file, or a directory.

    Args:
        path: What is locked.
        directory: Whether it is a directory, which may be renamed while it is locked.
        shared: Whether others may hold the lock too, if they share as well.
        create: Whether it is made if it is missing, with the directories above it.
        wait: Seconds to wait for another holder.
        poll: Seconds between two looks.
        holder: What this process is, to be written into the file with its number and host; empty writes nothing.
        required: Whether a file system without locks is an error; else there is a warning, and nothing is locked.

    Raises:
        LockHeldError: Another process holds it.
        OSError: It cannot be opened, or its file system has no locks.
    """
    deadline = time.monotonic() + wait
    flags = os.O_RDONLY if directory or not create else os.O_RDWR | os.O_CREAT
    while True:
        if create:
            (path if directory else path.parent).mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, flags, 0o666)
        try:
            if _try_lock(descriptor, path, shared=shared, required=required):
                if holder:
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, f"{holder} (process {os.getpid()} on {socket.gethostname()})".encode(), 0)
                lock, descriptor = HeldLock(descriptor), -1
                return lock
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise LockHeldError(path, "" if directory else _read_holder(descriptor)) from None
            time.sleep(poll)
        finally:
            if descriptor >= 0:
                os.close(descriptor)


def _try_lock(descriptor: int, path: Path, *, shared: bool, required: bool) -> bool:
    """Lock an open file; return False if it is no longer what lies at ``path``."""
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        # Some cluster file systems have no locks; the work can be done, if only one process does it.
        if required:
            raise
        logger.warning("%s cannot be locked (%s): make sure that nothing else writes there", path, error.strerror)
        return True
    try:
        # The holder before us may have removed or renamed it while we opened it: then this lock guards nothing.
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def holder_of(path: Path) -> str | None:
    """Return who holds the lock of a file, as far as the file says it; None if no process does."""
    try:
        acquire(path, create=False, shared=True).release()
    except FileNotFoundError:
        return None
    except LockHeldError as error:
        return error.holder or "another process"
    return None


def _read_holder(descriptor: int) -> str:
    return os.pread(descriptor, _HOLDER_BYTES, 0).decode("utf-8", errors="replace").strip()
