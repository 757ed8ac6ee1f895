"""Locks in a shared directory that end with the process that holds them, however it ends."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path
from typing import TextIO

from statex_dist.errors import ConfigError


def try_lock(path: Path, *, shared: bool = False) -> TextIO | None:
    """Lock the file at ``path``, making it and its directory if needed; closing the returned file unlocks it.

    This is ``flock``: the kernel drops it when the process is gone, and on NFS and other shared file systems it holds
    between machines.

    Args:
        path: The file.
        shared: Others may hold the lock too, if they share as well.

    Returns:
        The open file, or ``None`` if somebody else holds it.

    Raises:
        ConfigError: The directory cannot be written, or its file system has no locks.
    """
    try:
        while True:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a+", encoding="utf-8")
            try:
                fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
                # The holder before us may have removed the file while we opened it: then this lock guards nothing.
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    return file
            except BlockingIOError:
                file.close()
                return None
            except FileNotFoundError:
                pass
            file.close()
    except OSError as error:
        raise ConfigError(f"{path} cannot be locked: {error.strerror}; choose a directory elsewhere") from error


def sign(file: TextIO, what: str) -> None:
    """Write into a locked file who holds it, for the message that others get."""
    file.truncate(0)
    file.write(f"{what} (process {os.getpid()} on {socket.gethostname()})")
    file.flush()


def holder(path: Path) -> str | None:
    """Return what the holder of the lock at ``path`` wrote into it; ``None`` if nobody holds it."""
    if not path.exists():
        return None
    file = try_lock(path)
    if file is None:
        return path.read_text(encoding="utf-8").strip() or "another process"
    file.close()
    return None
