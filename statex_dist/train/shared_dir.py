"""Test that all ranks have the same run directory: each of them reads and writes there before the training.

Rank 0 makes a directory of a name that was never used and a file in it. Every rank reads this file and adds its own.
Rank 0 lists them. Each rank reads one file and writes one; all are removed again.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

from statex_dist.checkpoint.layout import CHECKPOINTS_DIR
from statex_dist.checkpoint.visible import fresh_names, wait_until_none
from statex_dist.distributed.disks import Disks
from statex_dist.distributed.ranks import Ranks
from statex_dist.durable.files import remove_leftovers, remove_tree
from statex_dist.errors import ConfigError, refusal
from statex_dist.train.run_lock import claim, not_held, taken_text, wait_for_own_job

PROBE_PREFIX = ".probe-"
"""Begins the name of the directory that rank 0 makes, and removes again."""

_SHOWN_HOSTS = 4


def require_shared(run_dir: Path, ranks: Ranks, *, patience: float = 0.0) -> None:
    """Raise, on all ranks, unless every rank reads and writes in the same run directory.

    The directory is left as it was: a missing one is made, and removed again.

    Args:
        run_dir: The run's directory.
        ranks: The ranks.
        patience: Seconds to wait for the end of an earlier start of this job that still holds the directory.

    Raises:
        ConfigError: A rank has another directory there, or cannot write into it, or another job trains there.
    """
    if ranks.rank == 0:
        with contextlib.suppress(OSError):  # a directory that cannot be read is refused below
            wait_for_own_job(run_dir, seconds=patience)
    with contextlib.ExitStack() as made:
        if problem := _problem(run_dir, ranks, made):
            made.close()
            # All ranks wait here: one that fails earlier could write its status into a directory that is being removed.
            ranks.broadcast(None)
            raise ConfigError(problem).on_all_ranks(ranks.rank)


@contextlib.contextmanager
def claim_together(run_dir: Path, ranks: Ranks, disks: Disks) -> Iterator[None]:
    """Hold the run's directory for all ranks: the first rank of each disk makes it and locks it.

    If one cannot, all ranks raise.

    Single files that a killed start was writing there are removed.

    Raises:
        ConfigError: The directory cannot be made, or another process holds the lock.
    """
    problem: str | None = None
    with contextlib.ExitStack() as held:
        if disks.leads:
            try:
                held.enter_context(claim(run_dir))
                (run_dir / CHECKPOINTS_DIR).mkdir(exist_ok=True)
                for probe in (*run_dir.glob(f"{PROBE_PREFIX}*"), *run_dir.glob(f"{CHECKPOINTS_DIR}/{PROBE_PREFIX}*")):
                    remove_tree(probe)
                remove_leftovers(run_dir)
            except ConfigError as error:
                problem = str(error)
            except OSError as error:
                problem = f"run_dir {run_dir} cannot be written: {refusal(error)}"
        if problem := next((text for text in ranks.gather(problem) if text), None):
            raise ConfigError(problem).on_all_ranks(ranks.rank)
        yield


def _problem(run_dir: Path, ranks: Ranks, made: contextlib.ExitStack) -> str | None:
    """Return why the directory will not do, the same on all ranks; ``made`` removes what this rank has made."""
    probe, problem, token = Path(), _taken(run_dir, ranks), uuid.uuid4().hex
    if ranks.rank == 0 and problem is None:
        try:
            # The checkpoints' directory may be a link to another file system.
            place = run_dir / CHECKPOINTS_DIR if (run_dir / CHECKPOINTS_DIR).is_dir() else run_dir
            made.enter_context(_made(place))
            probe = place / f"{PROBE_PREFIX}{token}"
            probe.mkdir()
            made.callback(shutil.rmtree, probe, ignore_errors=True)
            _write(probe, 0, token)
        except OSError as error:
            problem = f"run_dir {run_dir} cannot be written: {refusal(error)}"
    probe, token, problem = ranks.broadcast((probe, token, problem))
    if problem:
        return problem
    reports: list[tuple[str, str | None]] = ranks.gather((socket.gethostname(), _join(probe, ranks.rank, token, made)))
    problem = _refusal(run_dir, reports)
    if problem is None and ranks.rank == 0:
        unseen = wait_until_none(lambda: {f"rank{r}" for r in range(ranks.world_size)} - fresh_names(probe) or None)
        unheard = [int(name.removeprefix("rank")) for name in unseen or ()]
        problem = _refusal(run_dir, [(h, "" if r in unheard else None) for r, (h, _) in enumerate(reports)])
    if problem:
        problem = _taken(run_dir, ranks) or problem  # a job that began since then removes probes
    return ranks.broadcast(problem)


def _taken(run_dir: Path, ranks: Ranks) -> str | None:
    """Return on rank 0 that another job trains into the directory, if one does: no rank of this one has claimed it."""
    if ranks.rank:
        return None
    with not_held(run_dir) as free:
        return None if free else taken_text(run_dir)


def _join(probe: Path, rank: int, token: str, made: contextlib.ExitStack) -> str | None:
    """Read rank 0's file and write this rank's; return None, or the error (empty if there is no such file)."""

    def look() -> str | None:
        fresh_names(probe.parent)
        try:
            return None if (probe / "rank0").read_text(encoding="utf-8") == token else ""
        except FileNotFoundError:
            return ""
        except OSError as error:
            return refusal(error)

    problem = wait_until_none(look)
    if problem is None and rank:
        try:
            made.callback(_unlink, probe / f"rank{rank}")
            _write(probe, rank, token)
        except OSError as error:
            problem = refusal(error)
    return problem


def _write(probe: Path, rank: int, token: str) -> None:
    with (probe / f"rank{rank}").open("w", encoding="utf-8") as file:
        file.write(token)
        file.flush()
        os.fsync(file.fileno())


def _unlink(path: Path) -> None:
    """Remove a file if it exists; errors are ignored, since a file that could not be written cannot be removed."""
    with contextlib.suppress(OSError):
        path.unlink()


def _refusal(run_dir: Path, reports: list[tuple[str, str | None]]) -> str | None:
    """Return in one line which hosts do not share the directory, or None if all do."""
    failing: dict[str, int] = {}
    for rank, (host, problem) in enumerate(reports):
        if problem is not None:
            failing.setdefault(host, rank)
    if not failing:
        return None
    whose = _named(failing)
    if reason := next((problem for _, problem in reports if problem), None):
        return f"run_dir {run_dir} cannot be used on {whose}: {reason}"
    return (
        f"{whose} and rank 0 on {reports[0][0]} do not have the same directory at run_dir {run_dir} (a local disk, or "
        "a mount that is missing?); give a run_dir on a file system that all hosts share"
    )


def _named(first_ranks: Mapping[str, int]) -> str:
    shown = [f"{host} (rank {rank})" for host, rank in list(first_ranks.items())[:_SHOWN_HOSTS]]
    more = len(first_ranks) - len(shown)
    return ", ".join(shown) + (f" and {more} more hosts" if more else "")


@contextlib.contextmanager
def _made(directory: Path) -> Iterator[None]:
    """Make a directory and those above it; afterwards remove those that are new, and empty."""
    new = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            for path in new:
                path.rmdir()
