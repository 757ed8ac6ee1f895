"""Files that outlive a crash: atomic writes, journals, and the removal of what killed processes left behind.

After a crash a path that was written atomically holds the old contents or the new ones, never a part. A JSONL journal
lists the finished work of a job, one record a line, so that a killed job can continue. A line counts when its newline
is on disk; a last line without one was cut by the end of its process, and is dropped.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from statex_dist.durable.lock import HeldLock, acquire

logger = logging.getLogger(__name__)

T = TypeVar("T")

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


def remove_leftovers(directory: Path) -> None:
    """Delete the leftovers of killed saves, deletions and writes of single files in a directory."""
    for leftover in directory.glob(f"{TEMPORARY_PREFIX}*"):
        if leftover.is_dir() and not leftover.is_symlink():
            remove_tree(leftover)
            continue
        try:
            leftover.unlink()
        except OSError as error:
            logger.warning("%s cannot be removed: %s", leftover, error)


def remove_tree(directory: Path) -> None:
    """Rename a directory so that it is no checkpoint, then delete it; a failure is only logged."""
    try:
        shutil.rmtree(directory)
    except OSError as error:
        logger.warning("%s cannot be removed: %s", directory, error)


_DAMAGE = (ValueError, KeyError, TypeError, AttributeError, RecursionError)


class JournalDamageError(ValueError):
    """A line of a journal is no record.

    Attributes:
        path: The journal.
        line: Number of the line, from 1.
        cause: What its parser raised.
    """

    def __init__(self, path: Path, line: int, cause: Exception):
        super().__init__(f"{path}, line {line}: {cause}")
        self.path, self.line, self.cause = path, line, cause


def read_journal(path: Path, parse: Callable[[bytes], T] = json.loads) -> Iterator[T]:
    """Yield the records of a journal, oldest first.

    Args:
        path: The file; a missing one has no records.
        parse: Makes a record of a line, without its newline.

    Raises:
        JournalDamageError: ``parse`` raised ``ValueError``, ``KeyError``, ``TypeError`` or the like.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        try:
            record = parse(line)
        except _DAMAGE as error:
            raise JournalDamageError(path, number, error) from None
        yield record


class JsonlJournal:
    """A journal that a job appends to; a context manager.

    A last line that was cut is removed. The file is open only while a record is written: on NFS an open file would keep
    its directory from being removed.

    Args:
        path: The file, made if it is missing.
        exclusive: Whether it is locked for this process alone until it is closed.

    Raises:
        LockHeldError: Another process has it.
    """

    def __init__(self, path: Path, *, exclusive: bool = False):
        self.path = path
        self._lock: HeldLock | None = acquire(path, required=False) if exclusive else None
        with path.open("a+b") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
        sync(path.parent)

    def __enter__(self) -> JsonlJournal:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def append(self, record: Any, *, fsync: bool = True) -> None:
        """Write down a record.

        Args:
            record: JSON-able, without NaN.
            fsync: Whether it is on disk, and not only with the system, at the return.
        """
        rest = memoryview(_line(record))
        with self.path.open("ab", buffering=0) as file:
            end = file.tell()
            # On a full disk a part of the line may get there, and the next record would continue it.
            try:
                while rest:
                    rest = rest[file.write(rest) :]
            except OSError:
                file.truncate(end)
                raise
            if fsync:
                os.fsync(file.fileno())

    def rewrite(self, records: Iterable[Any]) -> None:
        """Replace all records, atomically. Not for an exclusive journal: its lock is on the file that is replaced."""
        assert self._lock is None
        write_durably(self.path, b"".join(map(_line, records)))

    def close(self) -> None:
        """Let others have the file."""
        if self._lock is not None:
            self._lock.release()


def _line(record: Any) -> bytes:
    return json.dumps(record, allow_nan=False).encode() + b"\n"
