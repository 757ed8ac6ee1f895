"""A limit on log records: clients decide how often something is logged, and must not fill a disk with it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

logger = logging.getLogger(__name__)

PERIOD_SECONDS = 60.0

_MOST_RECORDS = 5
"""Of a kind in a period."""

_MOST_KINDS = 32
"""That are told apart in a period."""

_MOST_CHARACTERS = 200
"""Of an example."""

_Kind = tuple[str, int, str]


class LogLimit(logging.Filter):
    """Lets the first records of each kind in a period pass, and counts the others. A kind is a logger, level and text.

    The text is the first line of the record's message before its values are put in. Traceback and values do not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self._counts: Counter[_Kind] = Counter()
        self._examples: dict[_Kind, str] = {}
        self._lock = Lock()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether ``record`` is written."""
        kind = (record.name, record.levelno, str(record.msg).partition("\n")[0][:_MOST_CHARACTERS])
        with self._lock:
            if kind not in self._counts and len(self._counts) >= _MOST_KINDS:
                kind = ("", logging.WARNING, "other messages")
            self._counts[kind] += 1
            self._examples.setdefault(kind, record.getMessage().partition("\n")[0][:_MOST_CHARACTERS])
            return self._counts[kind] <= _MOST_RECORDS

    def end_period(self) -> None:
        """Write how many records of each kind were left out, and start a new count."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
            examples, self._examples = self._examples, {}
        for kind, count in counts.items():
            if count > _MOST_RECORDS:
                more = count - _MOST_RECORDS
                logger.log(kind[1], "%d more in %g s or less like: %s", more, PERIOD_SECONDS, examples[kind])

    @contextmanager
    def on(self, *names: str) -> Iterator[None]:
        """Limit the loggers of these names until the block ends."""
        for name in names:
            logging.getLogger(name).addFilter(self)
        try:
            yield
        finally:
            for name in names:
                logging.getLogger(name).removeFilter(self)
            self.end_period()
