"""How a run ends: a request to stop, and its state in ``status.json`` for users and for the supervisor.

A start under a supervisor has a name (:data:`ATTEMPT_VARIABLE`), so that what an earlier start wrote, or a rank of it
that is still alive somewhere, is not taken for the news of this one.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Literal, get_args

from statex_dist.checkpoint.json_file import read_json
from statex_dist.checkpoint.layout import STATUS_NAME
from statex_dist.durable.files import write_json
from statex_dist.errors import StateXError

logger = logging.getLogger(__name__)

ATTEMPT_VARIABLE = "STATEX_ATTEMPT"
"""Environment variable that names this start of the run; the supervisor sets it."""

EXIT_PREEMPTED = 75
"""Exit code of a run that was told to stop, saved and can be resumed (sysexits' EX_TEMPFAIL)."""

IMPATIENCE_SECONDS = 5.0

State = Literal["running", "complete", "preempted", "failed"]


def this_attempt() -> str:
    """Return the name of this start; empty without a supervisor."""
    return os.environ.get(ATTEMPT_VARIABLE, "")


def this_job() -> str:
    """Return what all starts of this job have in common; empty for a start by hand.

    Attempts are named ``JOB-NUMBER``; torchrun's starts have one ``--rdzv-id``, whose default is ``none``.
    """
    if attempt := this_attempt():
        return attempt.rpartition("-")[0] or attempt
    return os.environ.get("TORCHELASTIC_RUN_ID", "").removeprefix("none")


def _starts_again() -> bool:
    """Return whether torchrun starts the ranks again by itself; the starts then have one name."""
    return os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


_BEGAN = _now()
"""When this process began, near enough; all ranks of a start begin within seconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStatus:
    """How a run is doing.

    Attributes:
        state: ``running``, ``complete`` (all steps done), ``preempted`` (told to stop, and saved) or ``failed``.
        step: Optimizer steps done (while it runs, those it began with); None if it failed before the first batch.
        world_size: Number of ranks.
        message: Why it failed, in one line.
        exit_code: With which the processes end, where that is known.
        time: When this was written (ISO 8601, UTC).
        attempt: Name of the start that wrote it; empty without a supervisor.
        epochs: Passes over each source of the data after these steps, by name; empty where they are not known.
        restart: Whether another start may succeed; false if the data or the settings must change first.
        starts: How many starts of the run have begun to train; 0 where that is not known.
    """

    state: State
    step: int | None
    world_size: int
    message: str = ""
    exit_code: int | None = None
    time: str = field(default_factory=_now)
    attempt: str = field(default_factory=this_attempt)
    epochs: Mapping[str, float] = field(default_factory=dict)
    restart: bool = True
    starts: int = 0

    def __post_init__(self) -> None:
        texts, numbers = (
            (self.message, self.time, self.attempt),
            (self.world_size, self.step or 0, self.exit_code or 0, self.starts),
        )
        if (
            self.state not in get_args(State)
            or not all(type(text) is str for text in texts)
            or not all(type(number) is int for number in numbers)
            or type(self.restart) is not bool
            or not isinstance(self.epochs, dict)
            or not all(isinstance(passes, int | float) for passes in self.epochs.values())
        ):
            raise ValueError(f"not a status: {self}")


def write_status(run_dir: Path, status: RunStatus) -> None:
    """Replace ``status.json`` durably; several processes may do so at once."""
    write_json(run_dir / STATUS_NAME, asdict(status), many_writers=True)


def write_failure(
    run_dir: Path,
    message: str,
    *,
    exit_code: int,
    world_size: int,
    step: int | None = None,
    epochs: Mapping[str, float] | None = None,
    restart: bool = True,
) -> None:
    """Record why a start failed, from any rank, on the way out.

    The first to speak names the cause; what other ranks say after it are consequences, and a run that is complete or
    pre-empted has not failed. Where the run has no directory nothing is written: a start that is refused leaves none.

    Args:
        run_dir: The run's directory.
        message: Why, in one line.
        exit_code: With which this process ends.
        world_size: Number of ranks.
        step: Optimizer steps done; None before the first batch.
        epochs: Passes over each source, where they are known.
        restart: Whether another start may succeed.
    """
    if not os.path.isdir(run_dir):  # noqa: PTH112 - False too where the system refuses the path itself
        return
    status = RunStatus(
        state="failed",
        step=step,
        world_size=world_size,
        message=message,
        exit_code=exit_code,
        epochs=dict(epochs or {}),
        restart=restart,
    )
    try:
        earlier = read_status(run_dir)
        if earlier is None or earlier.state == "running" or not _of_this_start(earlier):
            write_status(run_dir, replace(status, starts=earlier.starts if earlier else 0))
    except (StateXError, OSError) as error:
        # The failure itself is what has to reach the user; a full disk is a likely cause of both.
        logger.warning("%s was not written: %s", run_dir / STATUS_NAME, error)


def _of_this_start(status: RunStatus) -> bool:
    if status.attempt != this_attempt():
        return False
    if this_attempt() and not _starts_again():
        return True
    return datetime.fromisoformat(status.time) >= datetime.fromisoformat(_BEGAN)


def read_status(run_dir: Path) -> RunStatus | None:
    """Return what the run said last, or None where it has not said anything.

    Raises:
        StateXError: The file cannot be read.
    """
    path = run_dir / STATUS_NAME
    try:
        return RunStatus(**read_json(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise StateXError(f"{path} cannot be read ({reason}); delete it, the next start writes it anew") from None


class StopRequest:
    """Remembers that this process was told to stop.

    Launchers repeat themselves (deepspeed answers Ctrl-C by terminating ranks that have got the signal already), so
    repetitions are ignored; only an interrupt some seconds later is a user who will not wait for the save.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.received = False
        self._since = 0.0

    def install(self) -> None:
        """Start to listen."""
        for number in self.SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received, self._since = True, time.monotonic()
            logger.warning("%s received: saving after this step", signal.Signals(number).name)
        elif number == signal.SIGINT and time.monotonic() - self._since > IMPATIENCE_SECONDS:
            raise KeyboardInterrupt
