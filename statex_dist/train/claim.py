"""One holder of a run's directory at a time: a job that trains into it, or a supervisor that watches it."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock, Timeout

from statex_dist.errors import ConfigError, refusal

LOCK_NAME = ".lock"


class TakenError(ConfigError):
    """Another process holds the run's directory, so that its files are not this process's to write."""


def claim(
    run_dir: Path,
    *,
    lock_name: str = LOCK_NAME,
    taken: str = "another process is training into it; stop it first",
) -> FileLock:
    """Make the run's directory and return a held lock on it, which the system releases when this process ends.

    Args:
        run_dir: The run's directory.
        lock_name: File of the lock.
        taken: What it means that another process holds it, and what to do about that.

    Raises:
        TakenError: Another process holds the lock.
        ConfigError: The directory cannot be made.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = FileLock(run_dir / lock_name, blocking=False)
        lock.acquire()
    except Timeout:
        raise TakenError(f"run_dir {run_dir}: {taken}, or give another run_dir") from None
    except OSError as error:
        raise ConfigError(f"run_dir {run_dir} cannot be written: {refusal(error)}") from None
    return lock
