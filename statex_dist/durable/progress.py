"""Progress of a long job: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import logging
import time
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

log = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 10.0


class ProgressLine:
    """Counts steps and tokens of one phase; use as a context manager.

    Args:
        title: What is being done, for example ``"tokenize"``.
        total: Number of steps; None where it is not known.
        unit: What a step is, for example ``"files"``.
        done: Steps that were done before; they do not count for the speed.
    """

    def __init__(self, title: str, total: int | None, unit: str, done: int = 0):
        self.title = title
        self.total = total
        self.unit = unit
        self.tokens = 0
        self._done = self._done_before = done
        self._begin = self._spoken = time.monotonic()
        self._bar = _token_bar() if total is not None else None
        if self._bar is not None:
            self._task = self._bar.add_task(title, total=total, completed=done, rate="")

    def __enter__(self) -> ProgressLine:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        if kind is None and self.total is not None:
            log.info(f"{self.title}: {self._done}/{self.total} {self.unit}, {self._rate()}")

    def advance(self, steps: int, tokens: int) -> None:
        """Count ``steps`` more steps and ``tokens`` more tokens."""
        self._done += steps
        self.tokens += tokens
        if self._bar is not None:
            self._bar.update(self._task, advance=steps, rate=self._rate())
        elif time.monotonic() - self._spoken > _SECONDS_BETWEEN_LINES:
            self._spoken = time.monotonic()
            log.info(self._line())

    def _rate(self) -> str:
        seconds = max(time.monotonic() - self._begin, 1e-6)
        if self.total is None:
            return f"{self.tokens} tokens, {self.tokens / seconds:.0f} tokens/s"
        return f"{self.tokens / 1e6:.2f}M tokens, {self.tokens / seconds / 1e6:.2f}M tokens/s"

    def _line(self) -> str:
        total = "" if self.total is None else f"/{self.total}"
        return f"{self.title}: {self._done}{total} {self.unit}, {self._rate()}{self._left()}"

    def _left(self) -> str:
        steps = self._done - self._done_before
        if self.total is None or not steps or self._done >= self.total:
            return ""
        seconds = (time.monotonic() - self._begin) / steps * (self.total - self._done)
        return f", {timedelta(seconds=round(seconds))} left"


def _token_bar() -> Progress | None:
    """Return a bar on the terminal; None where there is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        return None
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    return Progress(*columns, TimeRemainingColumn(), console=console)
