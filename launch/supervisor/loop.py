"""Restart a training run until it is complete, is told to stop, or makes no progress."""

from __future__ import annotations

import hashlib
import logging
import random
import signal
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.supervisor import processes
from launch.supervisor.attempt import Attempt
from launch.supervisor.hosts import Host, answering, fill
from statex_dist.checkpoint.layout import CHECKPOINTS_DIR, STACKS_DIR, complete_tags, step_of
from statex_dist.errors import ConfigError, StateXError
from statex_dist.run_config import RunConfig
from statex_dist.train.run_lock import claim
from statex_dist.train.status import EXIT_PREEMPTED, RunStatus, StopRequest, read_status

logger = logging.getLogger(__name__)

LOCK_NAME = ".supervise.lock"
MAX_PAUSE_SECONDS = 600.0
_POLL_SECONDS = 0.2
_WRONG_USAGE = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """Limits of restarts.

    Attributes:
        min_ranks: Smallest number of ranks with which the run continues.
        max_restarts: Consecutive restarts that may end without a new checkpoint.
        backoff: Seconds before a restart; doubled with every consecutive restart without a new checkpoint.
        grace: Seconds in which ranks have to save after they are told to stop.
        spares: Hosts that are held back to replace others, so that the number of ranks stays the same.
    """

    min_ranks: int = 1
    max_restarts: int = 3
    backoff: float = 5.0
    grace: float = 300.0
    spares: int = 0

    def __post_init__(self) -> None:
        if self.min_ranks < 1:
            raise ConfigError(f"--min-ranks must be 1 or more, not {self.min_ranks}")
        for name in ("max_restarts", "backoff", "grace", "spares"):
            if getattr(self, name) < 0:
                raise ConfigError(f"--{name.replace('_', '-')} must be 0 or more, not {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why an attempt ended, and the exit code if there is to be no other."""

    reason: str
    exit_code: int | None = None


def _signal_name(number: int) -> str:
    return next((known.name for known in signal.Signals if known == number), f"signal {number}")


def _ranks(hosts: Sequence[Host]) -> int:
    return sum(host.slots for host in hosts)


class Supervisor:
    """Watches one run.

    Args:
        config: The run's configuration.
        arguments: What it was read from: the arguments of ``launch/train.py``.
        ranks: Ranks that this machine can run.
        hosts: Machines to use instead.
        policy: When to start again.

    Raises:
        ConfigError: There are too few ranks or hosts for the options.
    """

    def __init__(
        self,
        config: RunConfig,
        arguments: Sequence[str],
        *,
        ranks: int,
        hosts: Sequence[Host] = (),
        policy: Policy | None = None,
    ) -> None:
        self.config, self.arguments, self.hosts, self.policy = config, arguments, hosts, policy or Policy()
        self._available = list(hosts) or [Host("this machine", ranks)]
        self.run_dir = Path(config.run_dir)
        self.checkpoints = self.run_dir / CHECKPOINTS_DIR
        # Attempts of an earlier supervisor of the run are found by the first part.
        self.run_name = hashlib.sha256(str(self.run_dir.resolve()).encode()).hexdigest()[:16]
        self.stop = StopRequest()
        if self.policy.spares >= max(len(hosts), 1):
            raise ConfigError(f"--spares {self.policy.spares} leaves none of the {len(hosts)} hosts of --hostfile")
        used = self.use(self._available)
        if (ranks := _ranks(used)) < self.policy.min_ranks:
            raise ConfigError(
                f"{_ranks(self._available)} ranks are available, of which data.packs_per_step="
                f"{config.data.packs_per_step} and parallel.context={config.parallel.context} can use {ranks}, fewer "
                f"than --min-ranks {self.policy.min_ranks}"
            )
        if (group := config.parallel.context) > max(host.slots for host in used):
            logger.warning("no host has the %d slots of a context group: groups exchange states between hosts", group)

    def use(self, available: Sequence[Host]) -> list[Host]:
        """Return the hosts of those available that an attempt uses, with the slots that it takes of each."""
        alone = self.config.engine.name == "plain"
        hosts = available[: max(len(self._available) - self.policy.spares, 1)]
        return fill(hosts, group=self.config.parallel.context, most=1 if alone else self.config.data.packs_per_step)

    def run(self) -> int:
        """Bring the run to its end, and return the exit code.

        Raises:
            StateXError: Another supervisor watches the run, or a process does not die.
        """
        taken = "another supervisor watches it; stop that one first"
        with claim(self.run_dir, lock_name=LOCK_NAME, taken=taken):
            self.stop.install()
            self._end_leftovers()
            number, failures = 0, 0
            while not self.stop.received:
                number += 1
                before = self.newest_step()
                verdict = self._attempt(number)
                if verdict.exit_code is not None:
                    return verdict.exit_code
                failures = 0 if self.newest_step() > before else failures + 1
                if failures > self.policy.max_restarts:
                    logger.error(
                        "%d attempts in a row brought no new checkpoint: giving up (%s)", failures, verdict.reason
                    )
                    return 1
                self._pause(failures)
            return EXIT_PREEMPTED

    def newest_step(self) -> int:
        """Return the step of the newest complete checkpoint, or -1."""
        return max((step_of(tag) or 0 for tag in complete_tags(self.checkpoints)), default=-1)

    def _progress(self) -> str:
        step = self.newest_step()
        return "no checkpoint yet" if step < 0 else f"newest checkpoint of step {step}"

    def _end_leftovers(self) -> None:
        """End what a supervisor that was killed has left running: after a save, if the ranks still can."""
        if not processes.ask_ranks_to_stop(self.run_name):
            return
        logger.warning("an earlier supervisor has left ranks running: they are told to save and end")
        deadline = time.monotonic() + self.policy.grace
        while any(processes.find(self.run_name)) and time.monotonic() < deadline and not self.stop.received:
            time.sleep(_POLL_SECONDS)
        processes.kill(self.run_name)

    def _attempt(self, number: int) -> Verdict:
        """Start the job once, wait for its end, and say how it ended."""
        hosts = answering(self.hosts) if self.hosts else self._available
        used = self.use(hosts)
        ranks = _ranks(used)
        if ranks < self.policy.min_ranks:
            reason = f"{ranks} ranks can be used, too few for --min-ranks {self.policy.min_ranks}"
            logger.warning("attempt %d: %s", number, reason)
            return Verdict(reason)
        if spares := [host.name for host in hosts if host.name not in {used_host.name for used_host in used}]:
            logger.info("spare hosts: %s", ", ".join(spares))
        name, step, stacks = f"{self.run_name}-{uuid.uuid4().hex[:8]}", self.newest_step(), self._stacks()
        logger.info("attempt %d: %d ranks, from step %d", number, ranks, max(step, 0))
        began = time.monotonic()
        with Attempt(name, self.arguments, ranks=ranks, hosts=used if self.hosts else ()) as attempt:
            code = self._wait(attempt)
        verdict = self._judge(self._status(name), code, step)
        new = [str(path) for path, size in self._stacks().items() if size > stacks.get(path, 0)]
        logger.log(
            logging.INFO if verdict.exit_code in (0, EXIT_PREEMPTED) else logging.ERROR,
            "attempt %d: ended after %.0f s, %s: %s%s",
            *(number, time.monotonic() - began, self._progress(), verdict.reason),
            f"; stacks of the hanging ranks: {', '.join(new)}" if new else "",
        )
        return verdict

    def _wait(self, attempt: Attempt) -> int | None:
        """Wait for the launcher; pass on a request to stop. Return None if the ranks did not end in the time given."""
        deadline: float | None = None
        while (code := attempt.poll()) is None:
            if self.stop.received:
                if deadline is None:
                    logger.info("the ranks are told to save and end; they have %.0f s", self.policy.grace)
                    deadline = time.monotonic() + self.policy.grace
                if time.monotonic() > deadline:
                    return None
                attempt.ask_to_stop()
            time.sleep(_POLL_SECONDS)
        return code

    def _status(self, name: str) -> RunStatus | None:
        """Return the status that the attempt wrote, or None."""
        try:
            status = read_status(self.run_dir)
        except StateXError as error:
            logger.warning("%s", error)
            return None
        return status if status is not None and status.attempt == name else None

    def _judge(self, status: RunStatus | None, code: int | None, before: int) -> Verdict:
        if status is not None and status.state == "complete":
            return Verdict("complete", 0)
        if status is not None and status.state == "preempted":
            return Verdict(f"told to stop, and saved at step {status.step}", EXIT_PREEMPTED)
        reason = self._reason(status, code)
        if self.stop.received:
            return Verdict(f"told to stop, and not saved ({reason})", EXIT_PREEMPTED)
        if status is not None and not status.restart:
            return Verdict(f"{reason}; to start it again would not help", status.exit_code or 1)
        # A run that has got somewhere was not wrong: a disk or a network is away for a while.
        if status is not None and status.exit_code == _WRONG_USAGE and before <= 0 and not status.step:
            return Verdict(f"{reason}; to start it again would not help", _WRONG_USAGE)
        return Verdict(reason)

    def _reason(self, status: RunStatus | None, code: int | None) -> str:
        if code is None:
            ended = f"the ranks did not end within {self.policy.grace:.0f} s"
        elif code < 0:
            ended = f"launcher ended by {_signal_name(-code)}"
        else:
            ended = f"launcher exit code {code}"
        if status is not None and status.state == "failed":
            return f"{status.message} (exit code {status.exit_code}; {ended})"
        return ended

    def _stacks(self) -> dict[Path, int]:
        return {path: path.stat().st_size for path in sorted((self.run_dir / STACKS_DIR).glob("*.txt"))}

    def _pause(self, failures: int) -> None:
        pause = min(self.policy.backoff * 2 ** max(failures - 1, 0), MAX_PAUSE_SECONDS) * random.uniform(0.75, 1.25)
        without = f" ({failures} of {self.policy.max_restarts} that may bring no new checkpoint)" if failures else ""
        logger.info("starting again in %.0f s%s", pause, without)
        deadline = time.monotonic() + pause
        while time.monotonic() < deadline and not self.stop.received:
            time.sleep(_POLL_SECONDS)
