"""Ends a job that hangs, and records the place and the last collectives of every rank.

When one rank hangs, the others wait for it in their next collective. No rank makes progress, so every rank's watchdog
fires. Each writes the stacks of all its threads, and ends its process only a little later: the launcher ends the other
ranks as soon as one has ended, and their stacks are needed too.

A thread cannot run while another one is in C code that holds the GIL. For that case ``faulthandler`` has a separate
timer outside Python; it writes the stacks to the same file and ends the process with exit code 1.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from statex_dist.distributed import flight_recorder
from statex_dist.errors import reason
from statex_dist.train.callback import Callback, Ending

logger = logging.getLogger(__name__)

EXIT_HUNG = 76
"""Exit code of a process that the watchdog ended (sysexits' EX_PROTOCOL: the peers no longer answer)."""

_REARM_SECONDS = 1.0
"""Setting faulthandler's timer starts a thread (a quarter of a millisecond): too much for every beat."""

_LOOK_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class _Beat:
    """The last sign of life: when, what begins with it, at which step, and how long that may take."""

    time: float
    phase: str
    step: int | None
    limit: float


class Watchdog(Callback):
    """Expects a beat at least every ``timeout_seconds``, and ends the process if there is none.

    Args:
        timeout_seconds: Longest time between two beats. Longer than the slowest phase of a step, shorter than the
            timeout of collectives.
        directory: Where ``rank<N>.txt`` goes, on a disk that outlives the process.
        rank: This process among all.
        linger: Seconds between the stacks and the end, for the other ranks to write theirs.
        grace: Seconds after that when ``faulthandler`` steps in.
    """

    order = 0

    def __init__(
        self, timeout_seconds: float, directory: Path, rank: int, *, linger: float = 10.0, grace: float = 10.0
    ) -> None:
        assert timeout_seconds > 0
        self.timeout, self.path, self.rank = timeout_seconds, directory / f"rank{rank}.txt", rank
        # faulthandler's timer may be set up to a second before the last beat.
        self.linger, self.grace = linger, linger + max(grace, 2 * _REARM_SECONDS)
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._last = _Beat(0.0, "start", None, timeout_seconds)
        self._armed = _Beat(0.0, "start", None, 0.0)

    def on_phase(self, phase: str, step: int) -> None:
        """Take a phase of a step for a sign of life; the first one begins the watch."""
        if self._thread is None:
            self.start()
        self.beat(phase, step=step)

    def on_end(self, ending: Ending) -> None:
        """Stop to watch."""
        self.stop()

    def start(self) -> None:
        """Begin to watch; the first beat is this."""
        assert self._thread is None, "a watchdog is started once"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Append: the user will want to read the records of an earlier start.
        self._file = self.path.open("a", encoding="utf-8")
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.beat("start")
        self._thread.start()

    def beat(self, phase: str, *, step: int | None = None, allow: float | None = None) -> None:
        """Say that this rank lives.

        Args:
            phase: What begins now.
            step: The optimizer step; None keeps the last one.
            allow: Seconds that this phase may take, where that is known to be more (or less) than the timeout.
        """
        limit = self.timeout if allow is None else allow
        now = time.monotonic()
        self._last = _Beat(now, phase, self._last.step if step is None else step, limit)
        if self._thread is not None and (now - self._armed.time > _REARM_SECONDS or limit != self._armed.limit):
            self._armed = self._last
            faulthandler.dump_traceback_later(limit + self.grace, exit=True, file=self._file)

    def stop(self) -> None:
        """Stop to watch."""
        if self._thread is None:
            return
        faulthandler.cancel_dump_traceback_later()
        self._stopped.set()
        self._thread.join()
        self._thread = None
        empty = self._file.seek(0, os.SEEK_END) == 0
        self._file.close()
        if empty:
            self.path.unlink(missing_ok=True)

    def _watch(self) -> None:
        last = self._last
        # It looks now and then, and does not sleep until the limit: the next beat may allow less.
        while not self._stopped.wait(min(max(last.time + last.limit - time.monotonic(), 0.0), _LOOK_SECONDS)):
            last = self._last
            if time.monotonic() - last.time >= last.limit:
                self._end(last)

    def _end(self, last: _Beat) -> None:
        """Write the stacks and end the process."""
        # The main thread may hold any lock, and the disk may hang as well: nothing below may keep the process alive.
        last_resort = threading.Timer(self.grace, os._exit, (EXIT_HUNG,))
        last_resort.daemon = True
        last_resort.start()
        seconds = time.monotonic() - last.time
        at = "" if last.step is None else f" of step {last.step}"
        what = f"rank {self.rank} hangs: nothing for {seconds:.0f} s since '{last.phase}'{at} began"
        self._file.write(f"{datetime.now(UTC).isoformat(timespec='seconds')} {what}\n")
        self._file.flush()
        faulthandler.dump_traceback(file=self._file, all_threads=True)
        os.fsync(self._file.fileno())
        logger.error("%s; the stacks of its threads are in %s", what, self.path)
        faulthandler.dump_traceback(file=sys.__stderr__ or 2, all_threads=True)
        try:
            if written := flight_recorder.dump(self.path.parent, self.rank):
                logger.error("rank %d: its last collectives are in %s", self.rank, written)
        except (OSError, RuntimeError) as error:
            logger.error("rank %d: its last collectives are not written: %s", self.rank, reason(error))
        time.sleep(self.linger)
        os._exit(EXIT_HUNG)
