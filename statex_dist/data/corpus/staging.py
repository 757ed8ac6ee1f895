"""A dataset directory that appears complete or not at all.

Everything is written into a hidden sibling, flushed, and renamed into place. What a killed run leaves behind is found
and removed by the next one.

Before the renaming a second hidden sibling says which command makes which manifest. It is removed when the work
directory is gone: while it is there and fits, the same command finds its dataset complete and has to clean up only.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from types import TracebackType

from statex_dist.checkpoint.json_file import read_bytes, read_json
from statex_dist.data.manifest import MANIFEST_NAME, DatasetManifest
from statex_dist.durable.files import sync
from statex_dist.errors import ConfigError, refusal, writing

log = logging.getLogger(__name__)

# Outputs being made by this process. In containers a restarted run often has the process id of the one it replaces, so
# the id alone does not tell its own directories from those of the killed one.
_in_progress: set[Path] = set()


class Staging:
    """Context manager around the making of ``out``; leaving it without :meth:`commit` leaves no trace.

    Args:
        out: The directory to make.
        overwrite: Replace ``out`` where it is a dataset.
        inputs: Files that are being read; ``out`` may not hold one of them.
        command: Digest of the settings and inputs that the dataset depends on; equal ones make the same dataset.

    Attributes:
        finished: Whether a killed run of the same command has put the dataset into place, and only left its work.

    Raises:
        ConfigError: ``out`` may not be written or replaced.
    """

    def __init__(self, out: Path, *, overwrite: bool, inputs: Sequence[Path], command: str = ""):
        self.out = out.resolve()
        self._overwrite = overwrite
        name = f"{socket.gethostname()}-{os.getpid()}"
        self.directory = self.out.parent / f".{self.out.name}.partial-{name}"
        self._old = self.out.parent / f".{self.out.name}.old-{name}"
        self._command = command
        self._committed = self.out.parent / f".{self.out.name}.committed"
        self._recover()
        self.finished = bool(command) and self._is_committed()
        if not self.finished:
            self._check(inputs)

    def __enter__(self) -> Staging:
        if self.out in _in_progress:
            raise ConfigError(f"out {self.out} is already being made by this process")
        try:
            self.directory.mkdir(parents=True)
        except OSError as error:
            raise ConfigError(f"out {self.out} cannot be written: {refusal(error)}") from error
        _in_progress.add(self.out)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _in_progress.discard(self.out)
        shutil.rmtree(self.directory, ignore_errors=True)

    def commit(self, manifest: DatasetManifest) -> None:
        """Write the manifest, flush all files and rename the directory into place."""
        with writing(self.directory):
            for file in self.directory.iterdir():
                sync(file)
            manifest.write(self.directory)
            sync(self.directory / MANIFEST_NAME)
            sync(self.directory)
        self._refuse_existing()  # again: another run may have finished since
        with writing(self.out):
            self._committed.write_text(json.dumps(self._facts(self.directory)), encoding="utf-8")
            sync(self._committed)
            if self.out.exists() and any(self.out.iterdir()):
                self.out.replace(self._old)
            self.directory.replace(self.out)
            sync(self.out.parent)
        shutil.rmtree(self._old, ignore_errors=True)

    def clean(self) -> None:
        """Record that nothing is left to remove."""
        self._committed.unlink(missing_ok=True)

    def _facts(self, directory: Path) -> dict[str, str]:
        content = read_bytes(directory / MANIFEST_NAME)
        return {"command": self._command, "manifest": blake2b(content, digest_size=16).hexdigest()}

    def _is_committed(self) -> bool:
        try:
            return bool(read_json(self._committed) == self._facts(self.out))
        except (OSError, ValueError):
            return False

    def _recover(self) -> None:
        """Undo what killed runs on this host left: put an old dataset back, remove partial ones."""
        siblings = list(self.out.parent.iterdir()) if self.out.parent.is_dir() else []
        for kind in ("old", "partial"):
            prefix = f".{self.out.name}.{kind}-{socket.gethostname()}-"
            for left in siblings:
                if not left.name.startswith(prefix):
                    continue
                pid = left.name.removeprefix(prefix)
                if not pid.isdigit() or self._in_use(int(pid)):
                    continue
                if kind == "old" and not self.out.exists():
                    log.warning("a killed run had moved %s away; putting it back", self.out)
                    left.replace(self.out)
                else:
                    log.warning("removing %s, left by a killed run", left)
                    shutil.rmtree(left, ignore_errors=True)

    def _check(self, inputs: Sequence[Path]) -> None:
        if self.out.exists() and not self.out.is_dir():
            raise ConfigError(f"out {self.out} is a file; give a directory to make")
        if not self.out.exists() or not any(self.out.iterdir()):
            return
        self._refuse_existing()
        if not (self.out / MANIFEST_NAME).is_file() and not (self.out / "index.json").is_file():
            raise ConfigError(f"out {self.out} is not a dataset, so it is not overwritten; choose another directory")
        resolved = self.out.resolve()
        for file in inputs:
            if file.resolve().is_relative_to(resolved):
                raise ConfigError(f"out {self.out} holds the input {file}; choose another directory")

    def _in_use(self, pid: int) -> bool:
        if pid == os.getpid():
            return self.out in _in_progress
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # someone else's process: alive
        return True

    def _refuse_existing(self) -> None:
        if not self._overwrite and self.out.exists() and any(self.out.iterdir()):
            raise ConfigError(f"out {self.out} exists and is not empty; choose another or give --overwrite")
