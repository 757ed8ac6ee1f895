"""The work directory of ``statex prepare``: finished units that a later run, or another machine, need not do again.

``settings.json`` holds the rules under which the units were made. A unit's files are named by a digest of these rules
and of the unit: its input files, their sizes and times, and its range. So a changed input gives a new name, and no file
here can be taken for another.

A run that works alone holds ``lock`` for itself. Parts share it, and each holds a lock of its own besides.
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
from typing import Any

from statex_dist.checkpoint.json_file import MAX_JSON_BYTES, read_json
from statex_dist.data.corpus.documents import WorkUnit, file_facts
from statex_dist.data.corpus.unit_files import DONE_SUFFIX, UnitJob
from statex_dist.durable.lock import HeldLock, LockHeldError, acquire, holder_of
from statex_dist.errors import ConfigError, DataError, shown, writing
from statex_dist.work_part import WorkPart as WorkPart
from statex_dist.work_part import parse_part as parse_part

log = logging.getLogger(__name__)

_SETTINGS_NAME = "settings.json"
_LOCK_NAME = "lock"
# Raised when units are read or stored in another way, so that those of an older version are not taken.
_VERSION = 3
_NAMED = 3
# It lists the inputs; there may be millions.
_MAX_SETTINGS_BYTES = 10 * MAX_JSON_BYTES


class WorkDirectory:
    """Context manager around the use of a work directory.

    Args:
        path: The directory; made if missing.
        settings: What the tokens depend on, beside the inputs; JSON types.
        units: All units of the inputs, in order.
        part: The share that is done here; ``None`` for a run that works alone.
        merge: Only take what parts have done.

    Attributes:
        path: The directory.
        jobs: A job for every unit.
        parts: How many parts there are; ``None`` where none was begun.

    Raises:
        ConfigError: It is in use, is not a work directory, or was begun under other settings by parts.
    """

    def __init__(
        self,
        path: Path,
        settings: dict[str, Any],
        units: Sequence[WorkUnit],
        *,
        part: WorkPart | None,
        merge: bool = False,
    ):
        self.path = path.absolute()
        self.parts: int | None = None
        self._units = self.path / "units"
        self._settings = {"version": _VERSION, **settings}
        self._part = part
        self._merge = merge
        self._locks: list[HeldLock] = []
        facts = {name: file_facts(name) for unit in units for name in unit.paths}
        self._inputs = {os.path.abspath(name): list(found) for name, found in facts.items()}  # noqa: PTH100 - many files
        # Lines that another process has added since the files were split are in no unit.
        ends = {unit.paths[0]: unit.end for unit in units if unit.kind == "jsonl"}
        if changed := [name for name, end in ends.items() if facts[name][0] != end]:
            raise DataError(f"{changed[0]} changed while its size was being read; run the command again")
        self.jobs = [self._job(unit, tuple(facts[name] for name in unit.paths)) for unit in units]

    def __enter__(self) -> WorkDirectory:
        self._refuse_strange()
        if self._merge and not (self.path / _SETTINGS_NAME).is_file():
            raise DataError(f"work directory {self.path} does not exist: run the parts first, with --part I/N")
        self._lock()
        try:
            with writing(self.path):
                self._agree()
                self._units.mkdir(exist_ok=True)
                if self._part is None:
                    self._tidy()
        except BaseException:
            self._unlock()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not self._merge and self._units.is_dir():
            done = sum(1 for file in self._units.iterdir() if file.suffix == DONE_SUFFIX)
            if done:
                log.info("%d finished units are kept in %s; the same command continues from there", done, self.path)
            elif self._part is None:
                self.remove()
        self._unlock()

    def remove(self) -> None:
        """Remove the directory; this run must be the only one in it."""
        assert self._part is None
        shutil.rmtree(self._units, ignore_errors=True)
        for file in (self.path / _SETTINGS_NAME, *self.path.glob(f"{_LOCK_NAME}*")):
            file.unlink(missing_ok=True)
        if not any(self.path.iterdir()):
            self.path.rmdir()

    def identity(self) -> list[Any]:
        """Return the settings and inputs on which the tokens depend, in JSON types."""
        return [self._settings, self._inputs]

    def finish(self) -> None:
        """Remove the rest of a directory whose run was killed while it removed it.

        A directory in which another command has begun since is left alone.

        Raises:
            ConfigError: It is in use, or is not a work directory.
        """
        self._refuse_strange()
        if self.path.is_dir():
            self._lock()
            try:
                found = self._found()
                if found is None or [found.get("settings"), found.get("inputs")] == self.identity():
                    self.remove()
            finally:
                self._unlock()

    def _job(self, unit: WorkUnit, facts: tuple[tuple[int, int], ...]) -> UnitJob:
        files = [[os.path.abspath(name), *found] for name, found in zip(unit.paths, facts, strict=True)]  # noqa: PTH100
        identity = json.dumps([self._settings, unit.kind, files, unit.begin, unit.end], sort_keys=True)
        digest = blake2b(identity.encode(), digest_size=16).hexdigest()
        return UnitJob(unit, facts, str(self._units / digest))

    def _refuse_strange(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"work directory {self.path} is a file; choose another with --work")
        names = [file.name for file in self.path.iterdir()] if self.path.is_dir() else []
        strange = [name for name in names if not name.startswith((_LOCK_NAME, _SETTINGS_NAME)) and name != "units"]
        if strange:
            raise ConfigError(f"work directory {self.path} holds {strange[0]}, which is not ours; choose an empty one")

    def _lock(self) -> None:
        path, part = self.path / _LOCK_NAME, self._part
        try:
            self._locks.append(acquire(path, shared=part is not None, holder="" if part else "a run"))
            if part is not None:
                path = self.path / f"{_LOCK_NAME}-part-{part.index}-of-{part.count}"
                self._locks.append(acquire(path, holder=f"part {part}"))
        except LockHeldError as error:
            held = bool(self._locks)
            self._unlock()
            if held:
                raise ConfigError(
                    f"work directory {self.path} is in use by {error.holder}; a part cannot be run twice at once"
                ) from None
            paths = sorted(self.path.glob(f"{_LOCK_NAME}*"), key=lambda path: -len(path.name))
            who = next((name for path in paths if (name := holder_of(path)) is not None), "another process")
            raise ConfigError(
                f"work directory {self.path} is in use by {who}; wait for it, or choose another with --work"
            ) from None
        except OSError as error:
            self._unlock()
            raise ConfigError(f"{path} cannot be locked: {error.strerror}; choose a directory elsewhere") from error

    def _unlock(self) -> None:
        for lock in self._locks:
            lock.release()
        self._locks.clear()

    def _agree(self) -> None:
        """Compare the settings that the directory was begun with to those of this run, and record them."""
        found = self._found()
        if found is None:
            self.parts = self._part.count if self._part else None
            self._write_settings()
            # Another part may have begun at the same moment: what lies there now is what counts.
            found = self._found() or {}
        old, new = _object(found.get("settings")), self._settings
        differ = [
            f"{key} was {shown(old.get(key), 60)}, now {shown(new[key], 60)}" for key in new if old.get(key) != new[key]
        ]
        self.parts = found.get("parts") if type(found.get("parts")) is int else None
        if self._part is not None and self.parts not in (None, self._part.count):
            differ.append(f"the number of parts was {shown(self.parts, 60)}, now {self._part.count}")
        if differ and (self._merge or self._part is not None):
            raise ConfigError(
                f"work directory {self.path} was begun with other settings ({'; '.join(differ)}); give the same, "
                "or remove it to begin again"
            )
        if differ:
            log.warning("%s was begun with other settings (%s); beginning again", self.path, "; ".join(differ))
            shutil.rmtree(self._units, ignore_errors=True)
            self.parts = None
        elif changes := self._changes(_object(found.get("inputs"))):
            log.warning("inputs are not those of the run before: %s; what is the same is not done again", changes)
        if self._part is not None:
            self.parts = self._part.count
        if (self.parts, new, self._inputs) != (found.get("parts"), old, found.get("inputs")):
            self._write_settings(replace=True)

    def _found(self) -> dict[str, Any] | None:
        try:
            found = read_json(self.path / _SETTINGS_NAME, most=_MAX_SETTINGS_BYTES)
        except FileNotFoundError:
            return None
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def _write_settings(self, *, replace: bool = False) -> None:
        final = self.path / _SETTINGS_NAME
        temporary = self.path / f"{_SETTINGS_NAME}.tmp-{socket.gethostname()}-{os.getpid()}"
        content = {"settings": self._settings, "parts": self.parts, "inputs": self._inputs}
        temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
        try:
            if replace:
                temporary.replace(final)
            else:
                final.hardlink_to(temporary)
        except FileExistsError:
            pass
        finally:
            temporary.unlink(missing_ok=True)

    def _changes(self, before: dict[str, list[int]]) -> str:
        """Say how the inputs differ from ``before``; empty if they do not."""
        changed = [name for name, facts in self._inputs.items() if name in before and before[name] != facts]
        groups = {
            "changed": changed,
            "new": [name for name in self._inputs if name not in before],
            "gone": [name for name in before if name not in self._inputs],
        }
        return ", ".join(
            f"{', '.join(names[:_NAMED])}{f' and {len(names) - _NAMED} more' * (len(names) > _NAMED)} {what}"
            for what, names in groups.items()
            if names
        )

    def _tidy(self) -> None:
        """Remove what killed processes left half written, and units of inputs that have changed since."""
        names = {Path(job.base).name for job in self.jobs}
        for file in self._units.iterdir():
            if file.stem not in names or ".tmp-" in file.name:
                file.unlink(missing_ok=True)
        for file in self.path.glob(f"{_SETTINGS_NAME}.*"):
            file.unlink(missing_ok=True)


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
