"""Read a run's files for ``statex status``: state, progress, slowest host, last warnings.

Only ends of files are read, and torch is not imported, so that a look costs little at any length of a run. What cannot
be read is a note, not an error: a run in trouble is the one that is looked at.
"""

from __future__ import annotations

import os
import re
import socket
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from statex_dist.checkpoint.json_file import parse_json
from statex_dist.checkpoint.layout import (
    BEST_NAME,
    CHECKPOINTS_DIR,
    LOGS_DIR,
    MANIFEST_NAME,
    SETTINGS_NAME,
    STACKS_DIR,
    STATUS_NAME,
    complete_tags,
    step_of,
)
from statex_dist.durable.lock import LockHeldError, acquire
from statex_dist.errors import DataError, StateXError, one_line, os_error_text, reason
from statex_dist.train.metrics import METRICS_NAME, RECENT_STEPS
from statex_dist.train.run_lock import LOCK_NAME
from statex_dist.train.status import RunStatus, read_status

TAIL_BYTES = 1 << 20
"""Bytes at the end of ``metrics.jsonl`` that are read: some hundred records."""

LOG_TAIL_BYTES = 1 << 16
MAX_LOGS = 64
"""Logs that are read, the ones written last, and the bytes at the end of each."""

DEAD_SECONDS = 300.0
DEAD_STEPS = 20.0
"""A run is silent if it has written nothing for these seconds, and for the time of this number of its steps."""

_LOG_LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) (WARNING|ERROR|CRITICAL) (.*)")


@dataclass(kw_only=True)
class RunView:
    """A run as its files show it.

    Attributes:
        run_dir: The run's directory.
        state: ``starting``, ``running``, ``silent`` (a process holds the run, but nothing was written for long),
            ``dead`` (it was running, and no process is left), ``stopped`` (told to stop, and saved), ``complete`` or
            ``failed``.
        message: Why it failed.
        step: Optimizer steps done.
        num_steps: Those of the whole run.
        ranks: Number of ranks.
        starts: How often the run was started, where that is known.
        tokens_per_s: Of the last steps, all ranks.
        step_seconds: Mean of the last steps.
        eta_seconds: Time left at that speed; None where the run does not run.
        loss: Of the last step.
        eval_loss: Of the last validation among the records that were read.
        mfu: Of the last step.
        silent_seconds: Since a record, the status or rank 0's log was written.
        checkpoint: Newest complete checkpoint.
        checkpoint_step: Its step.
        checkpoint_seconds: Its age.
        best: Checkpoint with the least validation loss, where one is kept.
        phases: Of the last record with them: minimum, median, maximum and the slowest rank of each phase.
        phases_step: That record's step.
        stragglers: Ranks that this record names.
        stacks: Files with the stacks of ranks that the watchdog ended.
        last_log: Last warnings and errors of all ranks, oldest first: time, rank, level, text.
        holder: What the lock file says of the process that holds the run, or held it.
        notes: What could not be read.
    """

    run_dir: str
    state: str = "starting"
    message: str = ""
    step: int | None = None
    num_steps: int | None = None
    ranks: int | None = None
    starts: int | None = None
    tokens_per_s: float | None = None
    step_seconds: float | None = None
    eta_seconds: float | None = None
    loss: float | None = None
    eval_loss: float | None = None
    mfu: float | None = None
    silent_seconds: float | None = None
    checkpoint: str | None = None
    checkpoint_step: int | None = None
    checkpoint_seconds: float | None = None
    best: str | None = None
    phases: dict[str, dict[str, Any]] = field(default_factory=dict)
    phases_step: int | None = None
    stragglers: list[dict[str, Any]] = field(default_factory=list)
    stacks: list[str] = field(default_factory=list)
    last_log: list[dict[str, Any]] = field(default_factory=list)
    holder: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Whether the run is running, starting or ended as it should."""
        return self.state not in ("failed", "dead", "silent")

    def to_dict(self) -> dict[str, Any]:
        """Return the view as JSON has it."""
        return asdict(self)


def view_run(run_dir: Path, *, num_log_lines: int = 5) -> RunView:
    """Return what the files of a run say now.

    Args:
        run_dir: The run's directory.
        num_log_lines: Most warnings and errors of the logs to return.

    Raises:
        DataError: It is not the directory of a run.
    """
    try:
        names = {entry.name for entry in os.scandir(run_dir)}
    except OSError as error:
        raise DataError(f"{run_dir} is not the directory of a run: {os_error_text(error)}") from None
    if not names & {STATUS_NAME, METRICS_NAME, LOCK_NAME, CHECKPOINTS_DIR}:
        raise DataError(f"{run_dir} is not the directory of a run: no {STATUS_NAME}, {METRICS_NAME} or checkpoints")
    view = RunView(run_dir=str(run_dir))
    status = _status(run_dir, view)
    records = _records(run_dir / METRICS_NAME, view)
    view.num_steps = _num_steps(run_dir / SETTINGS_NAME, view)
    _read_progress(view, status, records)
    _read_checkpoints(run_dir / CHECKPOINTS_DIR, view)
    stacks = run_dir / STACKS_DIR
    view.stacks = sorted(str(path.relative_to(run_dir)) for path in stacks.glob("*.txt") if path.stat().st_size)
    view.last_log = read_log_ends(run_dir / LOGS_DIR, count=num_log_lines)
    _decide_state(run_dir, view, status)
    return view


def _status(run_dir: Path, view: RunView) -> RunStatus | None:
    try:
        return read_status(run_dir)
    except StateXError as error:
        view.notes.append(one_line(error))
    return None


def _tail(path: Path, size: int) -> list[str]:
    """Return the whole lines in the last ``size`` bytes of a file."""
    with path.open("rb") as file:
        end = os.fstat(file.fileno()).st_size
        begin = max(0, end - size)
        file.seek(max(0, begin - 1))
        data = file.read(size + 1)
    if begin:
        data = data.partition(b"\n")[2]
    return data.decode("utf-8", "replace").split("\n")


def _records(path: Path, view: RunView) -> list[dict[str, Any]]:
    try:
        lines = _tail(path, TAIL_BYTES)
    except FileNotFoundError:
        return []
    except OSError as error:
        view.notes.append(f"{path} cannot be read: {os_error_text(error)}")
        return []
    records, damaged = [], 0
    for line in lines[:-1]:  # what follows the last line's end is being written
        try:
            record = parse_json(line)
        except ValueError:
            record = None
        if isinstance(record, dict) and type(record.get("step")) is int:
            records.append(record)
        else:
            damaged += 1
    if damaged:
        view.notes.append(f"{path}: {damaged} of the last {len(lines) - 1} lines are no records")
    return records


def _num_steps(path: Path, view: RunView) -> int | None:
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        number = settings["train"]["num_steps"]
        if type(number) is not int:
            raise TypeError("train.num_steps is not a number")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, RecursionError, yaml.YAMLError) as error:
        view.notes.append(f"{path} does not tell train.num_steps: {reason(error)}")
        return None
    return number


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _read_progress(view: RunView, status: RunStatus | None, records: Sequence[Mapping[str, Any]]) -> None:
    """Take over what status and records say."""
    if status is not None:
        view.step, view.ranks, view.message = status.step, status.world_size or None, status.message
        view.starts = status.starts or None
    if not records:
        return
    last = records[-1]
    view.step = max(view.step or 0, last["step"])
    view.loss, view.mfu = _number(last.get("loss")), _number(last.get("mfu"))
    # The first step of a start, which compiles and allocates, says nothing of those that follow.
    timed = [(s, _number(r.get("tokens")) or 0.0) for r in records[-RECENT_STEPS:] if (s := _number(r.get("seconds")))]
    if timed:
        middle = statistics.median(seconds for seconds, _ in timed)
        usual = [(seconds, tokens) for seconds, tokens in timed if seconds <= 10 * middle]
        total = sum(seconds for seconds, _ in usual)
        view.step_seconds, view.tokens_per_s = total / len(usual), sum(tokens for _, tokens in usual) / total
    for record in reversed(records):
        if view.eval_loss is None and isinstance(record.get("eval"), dict):
            view.eval_loss = _number(record["eval"].get("loss"))
        if not view.phases and isinstance(record.get("ranks"), dict):
            phases = {name: dict(row) for name, row in record["ranks"].items() if isinstance(row, dict)}
            view.phases, view.phases_step = phases, record["step"]
            found = record.get("stragglers", [])
            view.stragglers = [dict(row) for row in found if isinstance(row, dict)] if isinstance(found, list) else []


def _read_checkpoints(checkpoints: Path, view: RunView) -> None:
    try:
        tags = complete_tags(checkpoints)
        if tags:
            view.checkpoint, view.checkpoint_step = tags[0], step_of(tags[0])
            view.checkpoint_seconds = max(0.0, time.time() - (checkpoints / tags[0] / MANIFEST_NAME).stat().st_mtime)
        if (checkpoints / BEST_NAME).is_symlink():
            view.best = str((checkpoints / BEST_NAME).readlink())
    except OSError as error:  # one may be deleted while it is looked at
        view.notes.append(f"{checkpoints}: {os_error_text(error)}")


def read_log_ends(directory: Path, *, count: int) -> list[dict[str, Any]]:
    """Return the last warnings and errors in the logs of all ranks, oldest first.

    Args:
        directory: ``logs`` of the run.
        count: Most lines to return.
    """
    paths = [(path.stat().st_mtime, path) for path in directory.glob("rank*.log")]
    found = []
    for _, path in sorted(paths, reverse=True)[:MAX_LOGS]:
        rank = path.stem.removeprefix("rank")
        for line in _tail(path, LOG_TAIL_BYTES):
            if match := _LOG_LINE.match(line):
                row = {"time": match[1], "rank": int(rank) if rank.isdecimal() else rank}
                found.append({**row, "level": match[2], "text": match[3]})
    found.sort(key=lambda row: row["time"])
    return found[max(0, len(found) - count) :]


def _decide_state(run_dir: Path, view: RunView, status: RunStatus | None) -> None:
    """Decide between a run that is running and one that is only said to be."""
    held = _held(run_dir / LOCK_NAME, view)
    places = (run_dir / METRICS_NAME, run_dir / STATUS_NAME, run_dir / LOGS_DIR / "rank0.log")
    written = [path.stat().st_mtime for path in places if path.is_file()]
    view.silent_seconds = max(0.0, time.time() - max(written)) if written else None
    view.state = {"preempted": "stopped"}.get(status.state, status.state) if status is not None else "starting"
    if view.state in ("running", "starting"):
        limit = max(DEAD_SECONDS, DEAD_STEPS * (view.step_seconds or 0.0))
        silent = view.silent_seconds is None or view.silent_seconds > limit
        # A free lock is proof on the host of its holder alone: some file systems keep locks on each host for itself.
        gone = held is False and view.holder.endswith(f" on {socket.gethostname()})")
        if gone or (silent and not held):
            view.state = "dead"
        elif silent and view.silent_seconds is not None:
            view.state = "silent"
    if view.state == "running" and view.step_seconds and view.num_steps is not None and view.step is not None:
        view.eta_seconds = max(0, view.num_steps - view.step) * view.step_seconds


def _held(path: Path, view: RunView) -> bool | None:
    """Return whether a process holds a run's lock; None where that cannot be seen."""
    try:
        view.holder = path.read_text(encoding="utf-8", errors="replace")[:200]
        acquire(path, create=False, shared=True).release()
    except LockHeldError:
        return True
    except OSError:
        return None  # no lock was made, or the file system has none
    return False
