"""A run in one line every few steps: where it is, how it learns, how fast it is and when it will be done."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

RECENT_STEPS = 50
"""Steps whose times tell when the run will end."""

NAMED_SOURCES = 3
"""Number of sources of a mixture whose epochs a line names."""


class StepLines:
    """Makes the lines of a run from its records.

    Rates are those of the steps since the line before. The first step of a start, in which kernels are compiled and
    memory is allocated, is in its own line and in nothing else.

    Args:
        log_every: Steps between lines; the first step always has one.
        num_steps: Steps of the whole run; None where its end is not known.
    """

    def __init__(self, *, log_every: int, num_steps: int | None):
        self._log_every, self._num_steps = log_every, num_steps
        self._recent: deque[float] = deque(maxlen=RECENT_STEPS)
        self._since: list[Mapping[str, Any]] = []
        self._started = False

    def line(self, record: Mapping[str, Any]) -> str | None:
        """Take a step's record and return the line that is due, or None."""
        first, self._started = not self._started, True
        self._since.append(record)
        if not first:
            self._recent.append(record["seconds"])
        if not first and record["step"] % self._log_every:
            return None
        text = self._text(record)
        self._since.clear()
        return text

    def _text(self, record: Mapping[str, Any]) -> str:
        seconds = sum(r["seconds"] for r in self._since)
        end = f"/{self._num_steps}" if self._num_steps is not None else ""
        parts = [
            f"step {record['step']}{end}",
            "no target" if record.get("targets") == 0 else f"loss {_number(record['loss'], '.4f')}",
            f"lr {record['lr']:.2e}",
            f"grad norm {_number(record['grad_norm'], '.3f')}",
            f"{sum(r['tokens'] for r in self._since) / seconds:,.0f} tokens/s",
        ]
        if "mfu" in record:
            # The utilisation is proportional to the throughput, so its mean over time is weighted by seconds.
            mfu = sum(r["mfu"] * r["seconds"] for r in self._since) / seconds
            parts.append(f"MFU {100 * mfu:.1f} %")
        if "data" in record.get("time", {}):
            waited = sum(r["time"]["data"] for r in self._since)
            parts.append(f"data {100 * waited / seconds:.1f} %")
        if "memory_bytes" in record:
            parts.append(f"{record['memory_bytes'] / (1 << 30):.2f} GiB")
        if record.get("skipped"):
            parts.append(f"{record['skipped']} skipped")
        if epochs := record.get("epochs"):
            parts.append(_epochs_text(epochs))
        if self._num_steps is not None and self._recent and record["step"] < self._num_steps:
            left = (self._num_steps - record["step"]) * sum(self._recent) / len(self._recent)
            parts.append(f"ETA {duration(left)}")
        return "  ".join(parts)


def _epochs_text(epochs: Mapping[str, float]) -> str:
    """Return how often the data was seen: one source without its name; of several, the most often seen ones."""
    if len(epochs) == 1:
        return f"epoch {next(iter(epochs.values())):.2f}"
    most = sorted(epochs.items(), key=lambda source: -source[1])[:NAMED_SOURCES]
    more = f" (+{len(epochs) - len(most)})" if len(epochs) > len(most) else ""
    return "epochs " + " ".join(f"{name} {passes:.2f}" for name, passes in most) + more


def _number(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)


def duration(seconds: float) -> str:
    """Return a time in its two largest units: ``2 d 3 h``, ``4 min 5 s``."""
    left = round(seconds)
    parts: list[str] = []
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count or parts or size == 1:
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2])
