"""One holder of a run's directory at a time: a job that trains into it, or a supervisor that watches it."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path

from statex_dist.durable.lock import HeldLock, LockHeldError, acquire, holder_of
from statex_dist.errors import ConfigError, refusal
from statex_dist.train.status import this_job

logger = logging.getLogger(__name__)

LOCK_NAME = ".lock"

TAKEN = "another process is training into it; stop it first"

_WAIT_SECONDS = 2.0
"""How long a lock is waited for: another start, which is refused, may be looking at it."""

_POLL_SECONDS = 0.5


def claim(
    run_dir: Path,
    *,
    lock_name: str = LOCK_NAME,
    taken: str = TAKEN,
) -> HeldLock:
    """Make the run's directory and return a held lock on it, which the system releases when this process ends.

    Args:
        run_dir: The run's directory.
        lock_name: File of the lock.
        taken: What it means that another process holds it, and what to do about that.

    Raises:
        ConfigError: The directory cannot be made, or another process holds the lock.
    """
    try:
        return acquire(run_dir / lock_name, wait=_WAIT_SECONDS, holder=_holder(), required=False)
    except LockHeldError:
        raise ConfigError(taken_text(run_dir, taken)) from None
    except OSError as error:
        raise ConfigError(f"run_dir {run_dir} cannot be written: {refusal(error)}") from None


def _holder() -> str:
    return f"statex, job {this_job()}" if this_job() else "statex"


def wait_for_own_job(run_dir: Path, *, seconds: float) -> None:
    """Wait until no earlier start of this job holds the directory; another job's holder is not waited for.

    Rank 0 of that start may live on a host that was cut off, until its collectives fail: two of them must not train.

    Args:
        run_dir: The run's directory.
        seconds: Longest wait.
    """
    deadline, told = time.monotonic() + seconds, False
    while this_job() and time.monotonic() < deadline:
        holder = holder_of(run_dir / LOCK_NAME)
        if holder is None or not holder.startswith(f"{_holder()} ("):
            return
        if not told:
            logger.warning("an earlier start of this job still holds %s: %s; waiting for its end", run_dir, holder)
            told = True
        time.sleep(_POLL_SECONDS)


def taken_text(run_dir: Path, taken: str = TAKEN) -> str:
    """Return the refusal of a directory that another process holds."""
    return f"run_dir {run_dir}: {taken}, or give another run_dir"


@contextlib.contextmanager
def not_held(run_dir: Path) -> Iterator[bool]:
    """Yield whether no process trains into a directory; none begins to until the context ends.

    Nothing is made. Several processes may look at once.
    """
    with contextlib.ExitStack() as stack:
        free = True
        try:
            stack.enter_context(acquire(run_dir / LOCK_NAME, create=False, shared=True))
        except LockHeldError:
            free = False
        except OSError:
            pass  # no lock was ever made there, or the file system has none
        yield free
