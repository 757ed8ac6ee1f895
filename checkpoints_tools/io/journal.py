"""The journal of a writer, with which a killed one resumes: one JSON line per finished step.

The first line identifies the target: the source's files, the plan, the options. A line about tensors is added when
their values are on disk, though perhaps in files that lack others. A line about a file is added when the file is
complete, synced and under its final name. A torn last line is ignored.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from statex_dist.checkpoint.json_file import parse_json
from statex_dist.checkpoint.manifest import FileRecord
from statex_dist.durable.files import JournalDamageError, JsonlJournal, read_journal, write_durably
from statex_dist.durable.lock import HeldLock, LockHeldError, acquire
from statex_dist.errors import CheckpointError

logger = logging.getLogger(__name__)

JOURNAL_NAME = "JOURNAL.jsonl"

PARTS_FOLDER, PARTS_NAME = ".parts", "parts.json"
"""What several machines that write a target together keep in its temporary directory."""


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


class TargetJournal:
    """The journal of one temporary directory; one process at a time holds it.

    Args:
        directory: The temporary directory, made if it does not exist.
        run: Fingerprint of the target that is being written.
        resume: Whether to continue an earlier process's files; else they are removed.
        name: Path of the journal below the directory.
        is_locked: Whether the caller has locked the directory: it is one of several parts.

    Raises:
        CheckpointError: Another process is writing there, or the files there belong to another run.
    """

    def __init__(self, directory: Path, *, run: str, resume: bool, name: str = JOURNAL_NAME, is_locked: bool = False):
        self.directory = directory
        self.files: dict[str, FileRecord] = {}
        self.tensors: dict[str, WrittenTensor] = {}
        self._write = threading.Lock()
        self._run, self._path, self._is_part = run, directory / name, is_locked
        self._lock: HeldLock | None = None
        try:
            if not is_locked:
                self._lock = acquire(directory, directory=True, required=False)
        except LockHeldError:
            raise CheckpointError(
                f"another process is writing {directory}; wait for it, or choose another target"
            ) from None
        try:
            self._begin(run, resume)
        except BaseException:
            with contextlib.suppress(OSError):
                directory.rmdir()  # it was made for nothing; one that holds anything stays
            self.close()
            raise

    def _begin(self, run: str, resume: bool) -> None:
        path = self._path
        if not self._is_part and (self.directory / PARTS_FOLDER / PARTS_NAME).exists():
            raise CheckpointError(
                f"{self.directory} holds an unfinished run with --part; run the parts, or remove the directory"
            )
        lines = _read_lines(path) if resume else []
        if lines:
            if lines[0].get("run") != run:
                raise CheckpointError(
                    f"{self.directory} holds an unfinished run of another source, plan or options; "
                    "run without --resume to start over, or with what it began with"
                )
            for line in lines[1:]:
                self._take(line)
        else:
            write_durably(path, json.dumps({"run": run}) + "\n")
        self._journal = JsonlJournal(path)

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
        lines: list[dict[str, Any]] = [{"run": self._run}]
        if self.tensors:
            lines.append({"tensors": _plain(self.tensors)})
        self._journal.rewrite([*lines, *({"file": n, "record": asdict(record)} for n, record in self.files.items())])
        if not self._is_part:
            self._remove_others(partial)
        if self.tensors or self.files:
            logger.info(
                "resuming %s: %d finished files, %d tensors", self.directory, len(self.files), len(self.tensors)
            )

    def take(self, name: str) -> None:
        """Take over what another part's journal says, of the same run."""
        for line in _read_lines(self.directory / name)[1:]:
            self._take(line)

    def _take(self, line: dict[str, Any]) -> None:
        self.tensors |= _tensors_of(line)
        if "file" in line:
            self.files[str(line["file"])] = FileRecord(**line["record"])

    def _remove_others(self, partial: Collection[str]) -> None:
        """Remove what is neither finished nor begun."""
        kept = {*self.files, *(name + PARTIAL_SUFFIX for name in partial if self.tensors), JOURNAL_NAME}
        for left in sorted(self.directory.rglob("*"), reverse=True):
            name = str(left.relative_to(self.directory))
            if left.is_dir() and not left.is_symlink():
                if not any(left.iterdir()):
                    left.rmdir()
            elif name not in kept:
                left.unlink()

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
        if not line:
            return
        with self._write:
            self._journal.append(line)
            self.tensors |= tensors
            if file is not None and record is not None:
                self.files[file] = record

    def close(self) -> None:
        """Let other processes write here."""
        if self._lock is not None:
            self._lock.release()


class ForwardedJournal:
    """The journal as a worker process has it: entries go to the parent, which writes them down.

    Args:
        journal: The journal at the time when the worker began.
        forward: Called with the arguments of :meth:`TargetJournal.add`.
    """

    def __init__(self, journal: TargetJournal | ForwardedJournal, forward: Callable[..., None]):
        self.directory: Path = journal.directory
        self.files: dict[str, FileRecord] = dict(journal.files)
        self.tensors: dict[str, WrittenTensor] = journal.tensors
        self._forward = forward

    def add(
        self, tensors: Mapping[str, WrittenTensor], file: str | None = None, record: FileRecord | None = None
    ) -> None:
        """Have tensors, and a file that is complete, written down (:meth:`TargetJournal.add`)."""
        if tensors or file is not None:
            self._forward(dict(tensors), file, record)
        if file is not None and record is not None:
            self.files[file] = record


def _plain(tensors: Mapping[str, WrittenTensor]) -> dict[str, dict[str, Any]]:
    return {key: asdict(tensor) for key, tensor in tensors.items()}


def _tensors_of(line: dict[str, Any]) -> dict[str, WrittenTensor]:
    return {str(key): WrittenTensor(**tensor) for key, tensor in line.get("tensors", {}).items()}


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the journal's lines up to the first that is torn or damaged."""
    lines: list[dict[str, Any]] = []

    def parse(text: bytes) -> dict[str, Any]:
        line = parse_json(text.decode("utf-8", errors="replace"))
        if not lines:
            str(line["run"])
        else:
            _tensors_of(line)
            if "file" in line:
                FileRecord(**line["record"])
        return line

    with contextlib.suppress(JournalDamageError):
        for line in read_journal(path, parse):
            lines.append(line)
    return lines
