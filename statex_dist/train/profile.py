"""The torch profiler on demand: what a few steps of a run spend their time on."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from statex_dist.checkpoint.formats.crc import WRITE_ERRORS
from statex_dist.errors import ConfigError
from statex_dist.train.callback import Callback, Ending

if TYPE_CHECKING:
    from statex_dist.batch import PackedBatch

logger = logging.getLogger(__name__)

TABLE_ROWS = 40


@dataclass(kw_only=True)
class ProfileConfig:
    """Which steps are profiled.

    Attributes:
        steps: ``FIRST:LAST``, both counted from 1 and included, such as ``"10:12"``; None profiles nothing.
        directory: Where traces and tables go; default ``profile`` in the run's directory.
        ranks: Ranks that are profiled.
        memory: Whether allocations are recorded too.
    """

    steps: str | int | None = None
    directory: str | None = None
    ranks: list[int] = field(default_factory=lambda: [0])
    memory: bool = False

    def __post_init__(self) -> None:
        if self.steps is not None:
            match = re.fullmatch(r"(\d+):(\d+)", str(self.steps))
            if match is None or not 1 <= int(match[1]) <= int(match[2]):
                # YAML 1.1 reads 10:12 as ten times sixty and twelve.
                quotes = ", in quotes where it stands in a file" if isinstance(self.steps, int) else ""
                raise ConfigError(
                    f"profile.steps must be FIRST:LAST, two steps from 1, such as '10:12'{quotes}; not {self.steps!r}"
                )
        if not self.ranks or min(self.ranks) < 0:
            raise ConfigError(f"profile.ranks must name ranks from 0, not {self.ranks}")

    @property
    def window(self) -> range:
        """The steps that are profiled."""
        first, last = map(int, str(self.steps).split(":")) if self.steps is not None else (1, 0)
        return range(first, last + 1)

    def build(self, run_dir: Path, *, rank: int, world_size: int) -> list[Callback]:
        """Return the profiler of a rank, if steps are to be profiled."""
        return [] if self.steps is None else [Profiler(self, run_dir, rank=rank, world_size=world_size)]


class Profiler(Callback):
    """Profiles the chosen steps of this rank and writes a Chrome trace and a table of the costliest operators.

    The step before the window warms the profiler up.

    Args:
        config: Which steps.
        run_dir: The run's directory.
        rank: This process.
        world_size: All processes.
    """

    order = 10

    def __init__(self, config: ProfileConfig, run_dir: Path, *, rank: int, world_size: int):
        if config.steps is not None and max(config.ranks) >= world_size:
            # Not an error: a run may continue with fewer ranks than it began with.
            logger.warning("profile.ranks %s: this run has the ranks 0..%d", config.ranks, world_size - 1)
        self._config, self._rank = config, rank
        self._directory = Path(config.directory) if config.directory is not None else run_dir / "profile"
        self._window = config.window if rank in config.ranks else range(0)
        self._profile: profile | None = None
        self._first = self._done = 0

    def pre_step(self, step: int, batch: Sequence[PackedBatch]) -> None:
        """Tell that the steps before ``step`` are done."""
        self.step(step - 1)

    def on_end(self, ending: Ending) -> None:
        """Write what was profiled."""
        if ending.step > self._done:
            self.step(ending.step)
        self.close()

    def step(self, done: int) -> None:
        """Tell that ``done`` steps of the run are done and the next one begins."""
        if not self._window:
            return
        self._done, following = done, done + 1
        if self._profile is not None:
            self._profile.step()
        elif self._window.start - 1 <= following < self._window.stop:
            self._start(following)
        if following >= self._window.stop:
            self._stop()

    def close(self) -> None:
        """End; an unfinished window is written as far as it came."""
        if self._window and self._done < self._window.start:
            logger.warning("profile.steps %s were not reached: the run ended before", self._config.steps)
        self._stop()

    def _start(self, step: int) -> None:
        self._first = max(step, self._window.start)
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        logger.info("profiling steps %d to %d", self._first, self._window.stop - 1)
        with warnings.catch_warnings():
            # There is no step to warm up in when the window begins at once.
            warnings.filterwarnings("ignore", message="Profiler won't be using warmup")
            plan = schedule(wait=0, warmup=self._first - step, active=self._window.stop - self._first, repeat=1)
        self._profile = profile(
            activities=activities,
            schedule=plan,
            on_trace_ready=self._write,
            profile_memory=self._config.memory,
            record_shapes=True,
            acc_events=True,
        )
        self._profile.start()

    def _stop(self) -> None:
        """End; an unfinished window is written as far as it came."""
        if self._profile is not None:
            self._profile.stop()
        elif self._window and self._done >= self._window.start:
            logger.warning("profile.steps %s are over already: nothing is profiled", self._config.steps)
        self._profile, self._window = None, range(0)

    def _write(self, finished: profile) -> None:
        first, last = self._first, self._done
        if last < first:
            return  # the run ended before the first step of the window did
        stem = f"rank{self._rank}-steps{first}-{last}"
        by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            finished.export_chrome_trace(str(self._directory / f"{stem}.json.gz"))
            table = finished.key_averages().table(sort_by=by, row_limit=TABLE_ROWS, max_name_column_width=60)
            (self._directory / f"{stem}.txt").write_text(table + "\n", encoding="utf-8")
        except WRITE_ERRORS as error:
            logger.warning("the profile of steps %d to %d cannot be written: %s", first, last, error)
            return
        logger.info("profile of steps %d to %d: %s", first, last, self._directory / f"{stem}.json.gz")
