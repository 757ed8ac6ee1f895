"""What a writer has finished, on disk, so that a killed one can go on: one JSON line per finished shard.

The first line says what is being written (the source's files, the plan, the options). A line is added only when its
shard is complete, synced and under its final name; a torn last line is ignored.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from statex_dist.checkpoint.manifest import FileRecord, write_durably
from statex_dist.errors import CheckpointError

logger = logging.getLogger(__name__)

JOURNAL_NAME = "JOURNAL.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardRecord:
    """One finished file.

    Attributes:
        record: Its size and digest.
        digests: xxh3-128 of each tensor's stored bytes, by name.
        source_digests: The same of the source's bytes, of tensors whose bytes were all read.
    """

    record: FileRecord
    digests: dict[str, str]
    source_digests: dict[str, str]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Return the record that :func:`dataclasses.asdict` wrote."""
        return cls(
            record=FileRecord(**values["record"]),
            digests=dict(values["digests"]),
            source_digests=dict(values["source_digests"]),
        )


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
        self.finished: dict[str, ShardRecord] = {}
        self._write = threading.Lock()
        self._lock = _lock(directory)
        try:
            self._begin(run, resume)
        except BaseException:
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
                name, shard = str(line["file"]), ShardRecord.from_dict(line["shard"])
                file = self.directory / Path(name).name
                if file.is_file() and file.stat().st_size == shard.record.size:
                    self.finished[file.name] = shard
            logger.info("resuming %s: %d finished files", self.directory, len(self.finished))
        text = json.dumps({"run": run}) + "\n" + "".join(_line(name, s) for name, s in self.finished.items())
        write_durably(path, text)
        for left in self.directory.iterdir():
            if left.name not in (*self.finished, JOURNAL_NAME):
                shutil.rmtree(left) if left.is_dir() else left.unlink()

    def add(self, file: str, shard: ShardRecord) -> None:
        """Write down that a file is complete; it must be synced and under its final name."""
        with self._write, (self.directory / JOURNAL_NAME).open("a", encoding="utf-8") as journal:
            journal.write(_line(file, shard))
            journal.flush()
            os.fsync(journal.fileno())
            self.finished[file] = shard

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


def _line(file: str, shard: ShardRecord) -> str:
    return json.dumps({"file": file, "shard": asdict(shard)}) + "\n"


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the journal's lines up to the first that is torn or damaged."""
    try:
        texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    lines: list[dict[str, Any]] = []
    for text in texts:
        try:
            line = json.loads(text)
            if lines:
                ShardRecord.from_dict(line["shard"])
                str(line["file"])
            else:
                str(line["run"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            break
        lines.append(line)
    return lines
