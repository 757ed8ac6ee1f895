"""The figures of a run: what a step's record holds, ``metrics.jsonl``, and the lines of the log."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from statex_dist.checkpoint.json_file import parse_json
from statex_dist.durable.files import sync, write_durably
from statex_dist.errors import ConfigError, DataError
from statex_dist.train.callback import Callback, Ending
from statex_dist.train.mfu import Throughput

if TYPE_CHECKING:
    from statex_dist.batch import PackedBatch

logger = logging.getLogger(__name__)

METRICS_NAME = "metrics.jsonl"

MAX_WAITING = 10_000
"""Records that are kept while the disk is full."""

RECENT_STEPS = 50
"""Steps whose times tell when the run will end."""

NAMED_SOURCES = 3
"""Number of sources of a mixture whose epochs a line names."""


@dataclass(kw_only=True)
class MetricsConfig:
    """Settings of the reported metrics.

    Attributes:
        log_every: Optimizer steps between log lines (every step goes to ``metrics.jsonl``).
        peak_tflops: Dense 16-bit peak of one device in TFLOP/s, for the MFU; None takes it from the device's name,
            where we know it.
        states_every: Optimizer steps between measurements of the layers' states; 0 for none.
        wandb_project: Weights & Biases project; None for none. Without a login it records offline.
        wandb_name: Name of the run there.
        straggler_factor: A rank that takes more than this multiple of the median over several log lines, in what it
            does by itself, is named in a warning; 0 for none.
        straggler_probe: Whether every rank times matrix products of a fixed size at each log line, alone: a slow device
            shows nowhere else. None does so on GPUs.
    """

    log_every: int = 10
    peak_tflops: float | None = None
    states_every: int = 100
    wandb_project: str | None = None
    wandb_name: str | None = None
    straggler_factor: float = 1.5
    straggler_probe: bool | None = None

    def __post_init__(self) -> None:
        if self.log_every < 1:
            raise ConfigError(f"metrics.log_every must be 1 or more, not {self.log_every}")
        if self.states_every < 0:
            raise ConfigError(f"metrics.states_every must be 0 or more, not {self.states_every}")
        if self.peak_tflops is not None and not 0 < self.peak_tflops < math.inf:
            raise ConfigError(f"metrics.peak_tflops must be a number above 0, not {self.peak_tflops}")
        if not (self.straggler_factor == 0 or 1 < self.straggler_factor < math.inf):
            raise ConfigError(
                f"metrics.straggler_factor must be above 1, or 0 for no warning, not {self.straggler_factor}"
            )

    def build(self, *, flops_per_token: int, flops_per_pair: int = 0) -> list[Callback]:
        """Return the callbacks that take and show a run's figures.

        Args:
            flops_per_token: FLOPs of forward and backward for one token of the model.
            flops_per_pair: The same of its attention, for a token and one that it reads.
        """
        from statex_dist.train.fleet import FleetPhases
        from statex_dist.train.wandb_run import Wandb

        file = MetricsFile()
        wandb: list[Callback] = []
        if self.wandb_project:
            wandb = [Wandb(project=self.wandb_project, run_name=self.wandb_name, earlier=file.records)]
        return [
            *([StateNorms(every=self.states_every)] if self.states_every else []),
            Throughput(flops_per_token=flops_per_token, flops_per_pair=flops_per_pair, peak_tflops=self.peak_tflops),
            FleetPhases(log_every=self.log_every, straggler_factor=self.straggler_factor, probes=self.straggler_probe),
            file,
            Console(log_every=self.log_every),
            *wandb,
        ]


class StateNorms(Callback):
    """Has the layers' states measured every ``every`` steps, and in each start's first."""

    order = 20

    def __init__(self, *, every: int):
        self.every = every

    def pre_step(self, step: int, batch: Sequence[PackedBatch]) -> None:
        """Ask for the measurement where it is due."""
        self.run.observe_states = step % self.every == 0 or step == self.run.start_step + 1

    def post_step(self, record: dict[str, Any]) -> None:
        """Add ``state_norms``, where they are known."""
        if self.run.observe_states and (norms := self.run.engine.state_norms()):
            record["state_norms"] = norms


class MetricsFile(Callback):
    """Writes one record per optimizer step to ``metrics.jsonl``.

    Records after the step of the start are of steps that were lost, and are dropped.
    """

    order, rank_0_only = 70, True

    def on_start(self) -> None:
        """Open the file."""
        self.path = self.run.run_dir / METRICS_NAME
        _drop_after(self.path, self.run.start_step)
        self.file = self.path.open("a", encoding="utf-8")
        sync(self.run.run_dir)
        self._unwritten: list[str] = []
        self._full = False

    def post_step(self, record: dict[str, Any]) -> None:
        """Write one step's record at once; numbers that are not finite become null, also for later callbacks.

        On a full disk it is kept for the next call: that must not end the run.
        """
        record |= _finite(record)
        self._unwritten.append(json.dumps(record, allow_nan=False) + "\n")
        self._write_waiting()

    def on_save(self, step: int) -> None:
        """Sync all records so far to disk: the step of a checkpoint has its record even if the process is killed."""
        self._write_waiting()
        try:
            os.fsync(self.file.fileno())
        except OSError as error:
            logger.warning("%s may lack its last records after a power cut: %s", self.path, error)

    def _write_waiting(self) -> None:
        try:
            while self._unwritten:
                size, data = os.fstat(self.file.fileno()).st_size, self._unwritten[0].encode()
                if os.write(self.file.fileno(), data) < len(data):
                    os.ftruncate(self.file.fileno(), size)  # half a line would spoil the next one
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                del self._unwritten[0]
            self._full = False
        except OSError as error:
            if not self._full:
                logger.warning("%s has gaps from here on, until it can be written again: %s", self.path, error)
            self._full = True
            if len(self._unwritten) > MAX_WAITING:
                del self._unwritten[0]

    def on_end(self, ending: Ending) -> None:
        """Close the file; name the records that could not be written."""
        if not hasattr(self, "file"):  # the run failed before
            return
        self._write_waiting()
        if self._unwritten:
            logger.warning("%s lacks the records of the last %d steps or more", self.path, len(self._unwritten))
        self.file.close()

    def records(self) -> Iterator[dict[str, Any]]:
        """Yield the records that the file holds."""
        with self.path.open(encoding="utf-8") as file:
            yield from filter(None, map(_record, file))


class Console(Callback):
    """Logs a line every few steps."""

    order, rank_0_only = 80, True

    def __init__(self, *, log_every: int):
        self._log_every = log_every

    def on_start(self) -> None:
        """Begin with the first line."""
        self._lines = StepLines(log_every=self._log_every, num_steps=self.run.num_steps)

    def post_step(self, record: dict[str, Any]) -> None:
        """Log the line that is due."""
        if line := self._lines.line(record):
            logger.info("%s", line)


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
        if not first and record["step"] % self._log_every and "eval" not in record:
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
            *([f"eval loss {_number(record['eval']['loss'], '.4f')}"] if "eval" in record else []),
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


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the records of a run, oldest first; a last line that is being written, or was cut short, is left out.

    Raises:
        DataError: There is no such file, it holds no record, or a line of it is none.
    """
    path = run_dir / METRICS_NAME
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise DataError(f"{run_dir} holds no {METRICS_NAME}: not the directory of a training run") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    records = []
    for number, line in enumerate(lines[:-1], 1):
        if (record := _record(line)) is None:
            raise DataError(f"{path}, line {number} is no record of a step: {line[:80]!r}")
        records.append(record)
    if (last := _record(lines[-1])) is not None:
        records.append(last)
    if not records:
        raise DataError(f"{path} holds no record: the run has not finished a step")
    return records


def _record(line: str) -> dict[str, Any] | None:
    try:
        record = parse_json(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _finite(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record that strict JSON can hold: readers of the file choke on NaN."""

    def clean(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: clean(item) for key, item in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {key: clean(value) for key, value in record.items()}


def _drop_after(path: Path, step: int) -> None:
    """Keep one record of each step up to ``step``, in order; warn of other lines and of steps without a record."""
    if not path.exists():
        return
    kept: dict[int, str] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        record = _record(line)
        if record is None and line:
            logger.warning("%s: dropping a line that is not a record: %.80s", path, line)
        elif record is not None and record["step"] <= step:
            kept[record["step"]] = line  # of two, the later one belongs to the step that was saved
    if missing := [number for number in range(1, step + 1) if number not in kept]:
        logger.warning(
            "%s has no record of %d of %d steps (the first of them: %d)", path, len(missing), step, missing[0]
        )
    write_durably(path, "".join(f"{kept[number]}\n" for number in sorted(kept)))
