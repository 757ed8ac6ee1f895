"""Where the parts of one target meet: machines that write it together, on a file system that they share.

The temporary directory of the target has a folder ``.parts``. ``parts.json`` there tells the run and the number of
parts; the first part makes the files that several parts write into, and then ``parts.json``. Each part has a lock, a
journal, and at its end a result: the checksums of the bytes that it wrote and read. The part that finds all results
completes the target. Locks are ``flock``: they end with their process.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from checkpoints_tools.io.journal import JOURNAL_NAME, PARTS_FOLDER, PARTS_NAME
from checkpoints_tools.io.target_file import FileRuns
from statex_dist.checkpoint.formats.piece_io import SourceRuns
from statex_dist.checkpoint.json_file import parse_json
from statex_dist.durable.files import write_durably
from statex_dist.durable.lock import HeldLock, LockHeldError, acquire
from statex_dist.errors import CheckpointError, shown
from statex_dist.work_part import WorkPart

_PREPARE, _FINISH = "prepare.lock", "finish.lock"
_POLL_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True, slots=True)
class PartResult:
    """Checksums that a part leaves for the one that completes the target.

    Attributes:
        files: Of its bytes in files that other parts write into, too, by name.
        source: Of the bytes that it read.
    """

    files: Mapping[str, FileRuns]
    source: SourceRuns


class PartDirectory:
    """The temporary directory as one part has it; a context manager around its work.

    Args:
        directory: The temporary directory, made if it does not exist.
        part: The part.
        run: Fingerprint of the target that is being written.

    Raises:
        CheckpointError: The part is being written by another process, or something else is.
    """

    def __init__(self, directory: Path, part: WorkPart, run: str):
        self.directory, self.part, self._run = directory, part, run
        self._folder = directory / PARTS_FOLDER
        self._locks: list[HeldLock] = []
        try:
            self._locks.append(acquire(directory, directory=True, shared=True))
            self._locks.append(acquire(self._path(part.index, "lock"), holder=f"part {part}"))
        except LockHeldError as error:
            self.close()
            if error.path == directory:
                raise CheckpointError(f"another process is writing {directory}; wait for it") from None
            raise CheckpointError(
                f"part {part} is being written to {directory} by {error.holder}; each part runs once at a time"
            ) from None

    def _path(self, index: int, ending: str) -> Path:
        return self._folder / f"{index}-of-{self.part.count}.{ending}"

    @property
    def journal_name(self) -> str:
        """Path of the part's journal below the directory."""
        return str(self._path(self.part.index, "jsonl").relative_to(self.directory))

    @property
    def finish_journal_name(self) -> str:
        """Path of the journal of the files that were completed after all parts."""
        return f"{PARTS_FOLDER}/finish.jsonl"

    def journals(self) -> list[str]:
        """Return the paths of all parts' journals below the directory."""
        paths = [self._path(index, "jsonl") for index in range(1, self.part.count + 1)]
        return [str(path.relative_to(self.directory)) for path in paths]

    def prepare(self, make: Callable[[], None]) -> None:
        """Call ``make`` if this part is the first; else wait until the first part has done so.

        Raises:
            CheckpointError: What lies there belongs to another run, or to another number of parts.
        """
        told = self._folder / PARTS_NAME
        with acquire(self._folder / _PREPARE, wait=math.inf, poll=_POLL_SECONDS):
            if (self.directory / JOURNAL_NAME).exists():
                raise CheckpointError(
                    f"{self.directory} holds an unfinished run without --part; continue without it, or remove that"
                )
            ours = {"run": self._run, "parts": self.part.count}
            if told.exists():
                found = parse_json(told.read_text(encoding="utf-8"))
                if found != ours:
                    what = "of another source, plan or options"
                    if found.get("parts") != self.part.count:
                        what = f"of {shown(found.get('parts'))} parts, not {self.part.count}"
                    raise CheckpointError(
                        f"{self.directory} holds an unfinished run {what}; give what it began with, or remove it"
                    )
                return
            make()
            (self._folder / _FINISH).touch()
            write_durably(told, json.dumps(ours) + "\n")

    @property
    def is_done(self) -> bool:
        """Whether the part has left its result."""
        return self._path(self.part.index, "json").exists()

    def leave(self, result: PartResult) -> None:
        """Leave the part's result, durably: with it the part is done."""
        files = {name: [*map(list, runs.items())] for name, runs in result.files.items()}
        text = json.dumps({"files": files, "source": result.source})
        write_durably(self._path(self.part.index, "json"), text + "\n")

    def results(self) -> Iterator[PartResult]:
        """Yield the results of all parts."""
        for index in range(1, self.part.count + 1):
            found = json.loads(self._path(index, "json").read_text(encoding="utf-8"))
            files = {name: dict(runs) for name, runs in found["files"].items()}
            yield PartResult(files=files, source=found["source"])

    @contextlib.contextmanager
    def finishing(self) -> Iterator[list[int] | None]:
        """Give the parts that are not done, or None where another part has completed the target.

        Only one part at a time is given an answer.
        """
        try:
            lock = acquire(self._folder / _FINISH, create=False, wait=math.inf, poll=_POLL_SECONDS)
        except FileNotFoundError:
            yield None
            return
        with lock:
            there = {*self._folder.iterdir()}  # a fresh listing: NFS remembers for a while what was not there
            yield [index for index in range(1, self.part.count + 1) if self._path(index, "json") not in there]

    def close(self) -> None:
        """Let others have the part."""
        for lock in reversed(self._locks):
            lock.release()

    def __enter__(self) -> PartDirectory:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
