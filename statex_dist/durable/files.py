"""Atomic writes: after a crash a path holds the old contents or the new ones, never a part."""

from __future__ import annotations

import json
import os
import socket
import threading
from pathlib import Path
from typing import Any

TEMPORARY_PREFIX = ".tmp-"
"""Begins the names of files and directories that are being written."""


def sync(path: Path) -> None:
    """Flush a file, or a directory's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename_durably(temporary: Path, final: Path) -> None:
    """Give a finished file or directory its final name, on disk before and after; an old file there is replaced."""
    sync(temporary)
    temporary.replace(final)
    sync(final.parent)


def write_durably(path: Path, content: str | bytes, *, fsync: bool = True, many_writers: bool = False) -> None:
    """Replace a file's contents: a reader sees the old or the new ones. Text becomes UTF-8.

    Args:
        path: The file; its directory exists.
        content: All that it is to hold.
        fsync: Whether this also holds after a power cut, and the new contents are on disk at the return.
        many_writers: Whether several threads or processes may write it at once; each has a temporary file of its own.
    """
    data = content.encode() if isinstance(content, str) else content
    if path.exists() and not path.is_file() and not path.is_dir():
        path.write_bytes(data)  # a device or a pipe, which a rename would replace
        return
    own = f"-{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}" if many_writers else ""
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}{own}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            if fsync:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if fsync:
        sync(path.parent)


def write_json(
    path: Path,
    value: Any,
    *,
    indent: int = 1,
    ensure_ascii: bool = True,
    fsync: bool = True,
    many_writers: bool = False,
) -> None:
    """Replace a file by a value as strict JSON, as :func:`write_durably` does.

    Raises:
        ValueError: The value holds NaN or Inf, which JSON has not.
    """
    text = json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, allow_nan=False) + "\n"
    write_durably(path, text, fsync=fsync, many_writers=many_writers)
