"""JSONL journals: what a job has finished, one record a line, so that a killed job can continue.

A line counts when its newline is on disk; a last line without one was cut by the end of its process, and is dropped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from statex_dist.durable.files import sync, write_durably
from statex_dist.durable.lock import HeldLock, acquire

T = TypeVar("T")

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
