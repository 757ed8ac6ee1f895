"""Where the records of many ranks go: a file for each rank, and a console that many ranks share without a flood.

A warning that repeats is shown once on the console, then counted, and the count is shown with a later one. Errors are
always shown. The file of a rank has every record.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from logging.handlers import RotatingFileHandler
from pathlib import Path

LOGGERS = ("statex_dist", "checkpoints_tools", "launch")
"""Names of this project's loggers."""

FORMAT = "%(asctime)s %(levelname)s %(message)s"
DATE_FORMAT = "%Y-%m-%d %H:%M:%S"

MAX_BYTES = 10_000_000
"""Size at which a new file is begun; the one before is kept as ``rank<N>.log.1``."""

FOLD_SECONDS = 60.0
"""Time for which repetitions of a warning are only counted."""

MAX_SIMILAR = 5
"""Different warnings that are shown at once where only their numbers differ."""

MAX_KINDS = 1000
"""Kinds of warnings that are remembered."""

OTHERS_PER_MINUTE = 64
"""Warnings of all ranks but rank 0 that the console shows in a minute; the rest is in the ranks' own logs."""


@dataclass(slots=True)
class _Kind:
    """Warnings that differ in numbers only: when one was shown, which ones, and how many were not since."""

    shown_at: float
    texts: set[str] = field(default_factory=set)
    hidden: int = 0


class FoldFilter(logging.Filter):
    """Hides repeated warnings on a handler.

    Args:
        clock: Returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        super().__init__()
        self._clock = clock
        self._kinds: dict[tuple[str, str], _Kind] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether ``record`` is shown; a warning that was hidden before says how often."""
        if record.levelno != logging.WARNING:
            return True
        now, text = self._clock(), record.getMessage()
        key = (record.name, re.sub(r"\d+", "0", text))
        if len(self._kinds) >= MAX_KINDS and key not in self._kinds:
            del self._kinds[next(iter(self._kinds))]
        kind = self._kinds.setdefault(key, _Kind(now))
        due = now - kind.shown_at >= FOLD_SECONDS
        if not due and (text in kind.texts or len(kind.texts) >= MAX_SIMILAR):
            kind.hidden += 1
            return False
        if kind.hidden:
            record.msg, record.args = f"{text} (and {kind.hidden} more like this before)", ()
        if due:
            kind.texts.clear()
        kind.texts.add(text)
        kind.shown_at, kind.hidden = now, 0
        return True


class ShareFilter(logging.Filter):
    """Lets a rank show its share of the warnings that the console takes from ranks other than rank 0.

    Args:
        per_minute: Most warnings of this rank in a minute.
        clock: Returns seconds.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic):
        super().__init__()
        self._per_minute, self._clock = per_minute, clock
        self._since, self._shown = -60.0, 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether ``record`` is shown."""
        if record.levelno != logging.WARNING:
            return True
        if (now := self._clock()) - self._since >= 60.0:
            self._since, self._shown = now, 0
        self._shown += 1
        return self._shown <= self._per_minute


class RankLogHandler(RotatingFileHandler):
    """Appends records to a rank's log; a log that cannot be written costs one line on stderr, and no run."""

    _failed = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the name is logging's
        """Say once why the log has gaps."""
        self._report(sys.exc_info()[1])

    def close(self) -> None:
        """Close the file; what cannot be written then is lost."""
        try:
            super().close()
        except OSError as error:
            self._report(error)

    def _report(self, error: BaseException | None) -> None:
        if not self._failed:
            self._failed = True
            sys.stderr.write(f"{self.baseFilename} cannot be written: {error}; it has gaps from here on\n")


@contextlib.contextmanager
def rank_log(path: Path, *, rank: int, world_size: int) -> Iterator[None]:
    """Write what this process logs inside to ``path`` too, and let the console show less of what other ranks say.

    Args:
        path: The rank's log, on any disk; it is continued if it is there.
        rank: This process.
        world_size: All processes.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = RankLogHandler(path, maxBytes=MAX_BYTES, backupCount=1, encoding="utf-8")
    except OSError as error:
        logging.getLogger(__name__).warning("this rank has no log of its own: %s", error)
        yield
        return
    handler.setFormatter(logging.Formatter(FORMAT, datefmt=DATE_FORMAT))
    start = f"rank {rank} of {world_size} starts: process {os.getpid()} on {socket.gethostname()}"
    handler.handle(logging.makeLogRecord({"levelno": logging.INFO, "levelname": "INFO", "msg": start}))
    share = ShareFilter(OTHERS_PER_MINUTE // world_size)
    loggers = [logging.getLogger(name) for name in LOGGERS]
    consoles = list({console for logger in loggers for console in logger.handlers}) if rank else []
    for console in consoles:
        console.addFilter(share)
    for logger in loggers:
        logger.handlers.insert(0, handler)  # before the console, which changes texts
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
        for console in consoles:
            console.removeFilter(share)
        handler.close()
