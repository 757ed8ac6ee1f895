"""Where a run's figures go: ``metrics.jsonl``, the log, and Weights & Biases."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from statex_dist.checkpoint.json_file import parse_json
from statex_dist.durable.files import sync, write_durably
from statex_dist.errors import ConfigError, DataError
from statex_dist.train.console import StepLines
from statex_dist.train.mfu import Utilisation
from statex_dist.train.wandb_run import WandbRun

logger = logging.getLogger(__name__)

METRICS_NAME = "metrics.jsonl"

MAX_WAITING = 10_000
"""Records that are kept while the disk is full."""


@dataclass(kw_only=True)
class MetricsConfig:
    """What is reported.

    Attributes:
        log_every: Optimizer steps between log lines (every step goes to ``metrics.jsonl``).
        peak_tflops: Dense 16-bit peak of one device in TFLOP/s, for the MFU; None takes it from the device's name,
            where we know it.
        states_every: Optimizer steps between measurements of the layers' states; 0 for none.
        wandb_project: Weights & Biases project; None for none. Without a login it records offline.
        wandb_name: Name of the run there.
    """

    log_every: int = 10
    peak_tflops: float | None = None
    states_every: int = 100
    wandb_project: str | None = None
    wandb_name: str | None = None

    def __post_init__(self) -> None:
        if self.log_every < 1:
            raise ConfigError(f"metrics.log_every must be 1 or more, not {self.log_every}")
        if self.states_every < 0:
            raise ConfigError(f"metrics.states_every must be 0 or more, not {self.states_every}")
        if self.peak_tflops is not None and not 0 < self.peak_tflops < math.inf:
            raise ConfigError(f"metrics.peak_tflops must be a number above 0, not {self.peak_tflops}")


class Metrics:
    """Writes one record per optimizer step; used on rank 0 only.

    ``tokens`` of a record are the positions of all packs, padding included (``best_fit`` pads little).

    Args:
        run_dir: The run's directory.
        config: What is reported.
        start_step: Steps done before; records after it are of steps that were lost, and are dropped.
        settings: The run's configuration, for wandb.
        num_steps: Steps of the whole run, for the time left; None where its end is not known.
        utilisation: Computes the MFU; None where the device's peak is not known.
    """

    def __init__(
        self,
        run_dir: Path,
        config: MetricsConfig,
        *,
        start_step: int,
        settings: dict[str, Any],
        num_steps: int | None = None,
        utilisation: Utilisation | None = None,
    ):
        self.path = run_dir / METRICS_NAME
        self._utilisation = utilisation
        self._lines = StepLines(log_every=config.log_every, num_steps=num_steps)
        _drop_after(self.path, start_step)
        self.file = self.path.open("a", encoding="utf-8")
        sync(run_dir)
        self._unwritten: list[str] = []
        self._full = False
        self._wandb = None
        if config.wandb_project:
            self._wandb = WandbRun(
                run_dir,
                project=config.wandb_project,
                name=config.wandb_name,
                settings=settings,
                start_step=start_step,
                earlier=_records(self.path),
            )

    def write(self, record: Mapping[str, Any]) -> None:
        """Write one step's record; ``record['step']`` counts from 1. Numbers that are not finite become null."""
        record = _finite(record)
        if self._utilisation is not None:
            record["mfu"] = self._utilisation.share(record["tokens_per_s"])
        self._append(json.dumps(record, allow_nan=False) + "\n")
        if self._wandb is not None:
            self._wandb.log(record)
        if line := self._lines.line(record):
            logger.info("%s", line)

    def flush(self) -> None:
        """Sync all records so far to disk: the step of a checkpoint has its record even if the process is killed."""
        self._write_waiting()
        try:
            os.fsync(self.file.fileno())
        except OSError as error:
            logger.warning("%s may lack its last records after a power cut: %s", self.path, error)

    def _append(self, line: str) -> None:
        """Write a line at once, or keep it for the next call: a full disk must not end the run."""
        self._unwritten.append(line)
        self._write_waiting()

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

    def close(self) -> None:
        """Close the file; name the records that could not be written."""
        self._write_waiting()
        if self._unwritten:
            logger.warning("%s lacks the records of the last %d steps or more", self.path, len(self._unwritten))
        self.file.close()
        if self._wandb is not None:
            self._wandb.finish()


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


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a file that holds nothing else."""
    with path.open(encoding="utf-8") as file:
        yield from filter(None, map(_record, file))


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
