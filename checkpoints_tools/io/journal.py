"""What a writer has finished, on disk, so that a killed one can go on: one JSON line per step.

The first line says what is being written (the source's files, the plan, the options). A line about tensors is added
when their values are on disk, though perhaps in files that lack others; one about a file when it is complete, synced
and under its final name. A torn last line is ignored.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import threading
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from statex_dist.checkpoint.json_file import parse_json
from statex_dist.checkpoint.manifest import FileRecord, write_durably
from statex_dist.errors import CheckpointError

logger = logging.getLogger(__name__)

JOURNAL_NAME = "JOURNAL.jsonl"


PARTIAL_SUFFIX = ".partial"
"""Ending of a file that still lacks values."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WrittenTensor:
    """Digests of one tensor: of its stored bytes, and of the source's where all of them were copied."""

    xxh3_128: str
    source_xxh3_128: str | None = None


def fingerprint(facts: dict[str, Any]) -> str:
    """Return a digest of JSON values, which two runs share exactly if they write the same target."""
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()


class Journal:
    """The journal of one temporary directory, held by one process at a time.

    Args:
        directory: The temporary directory, made if it is not there.
        run: Fingerprint of what is being written.
        resume: Whether to go on with what an earlier process left; else it is removed.

    Raises:
        CheckpointError: Another process is writing there, or what is there belongs to another run.
    """

    def __init__(self, directory: Path, *, run: str, resume: bool):
        self.directory = directory
        self.files: dict[str, FileRecord] = {}
        self.tensors: dict[str, WrittenTensor] = {}
        self._write = threading.Lock()
        self._lock = _lock(directory)
        try:
            self._begin(run, resume)
        except BaseException:
            with contextlib.suppress(OSError):
                directory.rmdir()  # it was made for nothing; one that holds anything stays
            self.close()
            raise

    def _begin(self, run: str, resume: bool) -> None:
        path = self.directory / JOURNAL_NAME
        lines = _read_lines(path) if resume else []
        if lines:
            if lines[0].get("run") != run:
                raise CheckpointError(
                    f"{self.directory} holds an unfinished run of another source, plan or options; "
                    "run without --resume to start over, or with what it began with"
                )
            for line in lines[1:]:
                self.tensors |= _tensors_of(line)
                if "file" in line:
                    self.files[str(line["file"])] = FileRecord(**line["record"])
        else:
            write_durably(path, json.dumps({"run": run}) + "\n")

    def settle(self, files: Mapping[str, int], tensors: Mapping[str, Collection[str]]) -> None:
        """Forget what turns out not to be there any more, and remove what belongs to nothing.

        Args:
            files: Bytes of every file of the target.
            tensors: The files of every tensor.
        """
        for name in [*self.files]:
            path = self.directory / name
            if name not in files or not path.is_file() or path.stat().st_size != self.files[name].size:
                del self.files[name]
        partial = {
            name
            for name, size in files.items()
            if (path := self.directory / (name + PARTIAL_SUFFIX)).is_file() and path.stat().st_size == size
        }
        for key in [*self.tensors]:
            if not all(file in self.files or file in partial for file in tensors.get(key, ("",))):
                del self.tensors[key]
        missing = {file for key, names in tensors.items() if key not in self.tensors for file in names}
        self.files = {name: record for name, record in self.files.items() if name not in missing}
        text = (self.directory / JOURNAL_NAME).read_text(encoding="utf-8").splitlines()[0] + "\n"
        text += _line({"tensors": _plain(self.tensors)}) if self.tensors else ""
        text += "".join(_line({"file": name, "record": asdict(record)}) for name, record in self.files.items())
        write_durably(self.directory / JOURNAL_NAME, text)
        kept = {*self.files, *(name + PARTIAL_SUFFIX for name in partial if self.tensors), JOURNAL_NAME}
        for left in sorted(self.directory.rglob("*"), reverse=True):
            name = str(left.relative_to(self.directory))
            if left.is_dir() and not left.is_symlink():
                if not any(left.iterdir()):
                    left.rmdir()
            elif name not in kept:
                left.unlink()
        if self.tensors or self.files:
            logger.info(
                "resuming %s: %d finished files, %d tensors", self.directory, len(self.files), len(self.tensors)
            )

    def add(
        self, tensors: Mapping[str, WrittenTensor], file: str | None = None, record: FileRecord | None = None
    ) -> None:
        """Write down tensors whose values are on disk and, with them, a file that is complete.

        Args:
            tensors: By key.
            file: The file, synced and under its final name.
            record: Its record.
        """
        line: dict[str, Any] = {}
        if file is not None and record is not None:
            line |= {"file": file, "record": asdict(record)}
        if tensors:
            line |= {"tensors": _plain(tensors)}
        with self._write, (self.directory / JOURNAL_NAME).open("a", encoding="utf-8") as journal:
            journal.write(_line(line))
            journal.flush()
            os.fsync(journal.fileno())
            self.tensors |= tensors
            if file is not None and record is not None:
                self.files[file] = record

    def close(self) -> None:
        """Let other processes write here."""
        os.close(self._lock)


def _lock(directory: Path) -> int:
    """Make a directory and lock it; return the descriptor that holds the lock.

    Raises:
        CheckpointError: Another process has it.
    """
    while True:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise CheckpointError(
                f"another process is writing {directory}; wait for it, or choose another target"
            ) from None
        except OSError as error:
            # Some cluster file systems have no locks; the work can be done, if only one process does it.
            logger.warning(
                "%s cannot be locked (%s): make sure that nothing else writes there", directory, error.strerror
            )
            return descriptor
        try:
            if os.path.samestat(os.fstat(descriptor), directory.stat()):
                return descriptor
        except FileNotFoundError:
            pass
        os.close(descriptor)  # its last owner renamed or removed it between our two calls


def _line(values: dict[str, Any]) -> str:
    return json.dumps(values) + "\n"


def _plain(tensors: Mapping[str, WrittenTensor]) -> dict[str, dict[str, Any]]:
    return {key: asdict(tensor) for key, tensor in tensors.items()}


def _tensors_of(line: dict[str, Any]) -> dict[str, WrittenTensor]:
    return {str(key): WrittenTensor(**tensor) for key, tensor in line.get("tensors", {}).items()}


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the journal's lines up to the first that is torn or damaged."""
    try:
        texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    lines: list[dict[str, Any]] = []
    for text in texts:
        try:
            line = parse_json(text)
            if lines:
                _tensors_of(line)
                if "file" in line:
                    FileRecord(**line["record"])
            else:
                str(line["run"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            break
        lines.append(line)
    return lines
