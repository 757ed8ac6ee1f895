"""The training loop: batches in, steps out, a checkpoint now and then.

It knows an engine and an iterator of batches, and nothing of models, DeepSpeed or files. Whatever one rank alone finds
out (bad data, a signal, files written) is agreed on once a step, in one small all-reduce.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

from statex_dist.batch import PackedBatch
from statex_dist.config import check_finite
from statex_dist.engine.base import TrainEngine
from statex_dist.engine.checkpoint_retention import SavePolicy
from statex_dist.engine.checkpoints import Checkpoints
from statex_dist.errors import CheckpointError, ConfigError, DataError, StateXError, os_error_text
from statex_dist.train.guard import NO_TARGETS, BadStepsError, Guard
from statex_dist.train.metrics import Metrics
from statex_dist.train.profile import Profiler
from statex_dist.train.signals import StopRequest
from statex_dist.train.watchdog import Watchdog

logger = logging.getLogger(__name__)

MAX_RETRIES = 10


@dataclass(kw_only=True)
class TrainConfig:
    """How long to train and how often to save.

    Attributes:
        num_steps: Optimizer steps of the whole run.
        save_every: Steps between checkpoints; 0 saves only at the end.
        keep_last: Newest checkpoints that are kept.
        keep_every: Checkpoints of every so many steps are kept for ever; 0 for none.
        save_async: Whether training goes on while a checkpoint is written, from a copy in host memory.
        save_retries: Further attempts of a rank whose files could not be written.
        hang_minutes: A phase of a step that takes longer ends the job, with the stacks of every rank; 0 never, None
            after two thirds of ``engine.timeout_minutes``, when collectives have not given up yet.
        shared_run_dir: Whether all ranks have the same ``run_dir``, which is tested at the start. ``false`` is for run
            directories on each host's own disk, and is refused: it is not built yet.
        state_passing: Probability of a sequence to begin from the state at another's end instead of an empty one
            (arXiv 2507.02782), so that long texts do not meet the model with states it has never seen.
    """

    num_steps: int
    save_every: int = 0
    keep_last: int = 2
    keep_every: int = 0
    save_async: bool = False
    save_retries: int = 2
    hang_minutes: float | None = None
    shared_run_dir: bool = True
    state_passing: float = 0.0

    def __post_init__(self) -> None:
        check_finite(self, "train")
        for name in ("num_steps", "keep_last"):
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name} must be 1 or more, not {getattr(self, name)}")
        for name in ("save_every", "keep_every", "save_retries", "hang_minutes"):
            if (getattr(self, name) or 0) < 0:
                raise ConfigError(f"train.{name} must be 0 or more, not {getattr(self, name)}")
        if not self.shared_run_dir:
            raise ConfigError(
                "train.shared_run_dir false (a run_dir on each host's own disk) is not implemented; leave it true, and "
                "give a run_dir on a file system that all hosts share"
            )
        if not 0 <= self.state_passing <= 1:
            raise ConfigError(f"train.state_passing is a probability, from 0 to 1, not {self.state_passing}")
        if self.save_retries > MAX_RETRIES:
            raise ConfigError(f"train.save_retries must be {MAX_RETRIES} or less, not {self.save_retries}")
        if self.keep_every and (self.save_every == 0 or self.keep_every % self.save_every):
            raise ConfigError(
                f"train.keep_every={self.keep_every} must be a multiple of train.save_every={self.save_every}"
            )

    @property
    def save_policy(self) -> SavePolicy:
        """How checkpoints are written and which are kept."""
        return SavePolicy(
            keep_last=self.keep_last,
            keep_every=self.keep_every,
            asynchronous=self.save_async,
            retries=self.save_retries,
        )


@dataclass(kw_only=True, slots=True)
class Observers:
    """Who looks on.

    Attributes:
        metrics: Writes the figures; None on ranks above 0.
        watchdog: Told of every phase; None where nobody watches.
        profiler: Told of every step; None where nothing is profiled.
        states_every: Steps between measurements of the states' norms; 0 for none.
    """

    metrics: Metrics | None = None
    watchdog: Watchdog | None = None
    profiler: Profiler | None = None
    states_every: int = 0

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Have the watchdog and the profiler follow what is done inside."""
        with ExitStack() as stack:
            if self.profiler is not None:
                stack.enter_context(self.profiler)
            if self.watchdog is not None:
                self.watchdog.start()
                stack.callback(self.watchdog.stop)
            yield


@dataclass(slots=True)
class _Fetched:
    """A batch that is there, or why there is none, and the seconds that were waited for it."""

    batch: list[PackedBatch] = field(default_factory=list)
    problem: StateXError | None = None
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Agreed:
    """What all ranks know after a step: whether any has no batch or was told to stop, whether all have written."""

    no_batch: bool
    stop: bool
    written: bool


class Trainer:
    """Runs optimizer steps until the run is complete or told to stop.

    Args:
        engine: Computes steps.
        batches: Yields this data-parallel rank's packs of each global batch.
        config: How long, how often.
        checkpoints: Saves.
        guard: Judges steps.
        observers: Look on.
        stop: Whether this process was told to stop.
        start_step: Steps done before.
        facts: What the learning rate follows from; every checkpoint keeps it.
    """

    def __init__(
        self,
        engine: TrainEngine,
        batches: Iterator[list[PackedBatch]],
        config: TrainConfig,
        *,
        checkpoints: Checkpoints,
        guard: Guard,
        observers: Observers,
        stop: StopRequest,
        start_step: int = 0,
        facts: Mapping[str, Any] | None = None,
    ):
        self.engine = engine
        self.batches = batches
        self.config = config
        self.checkpoints = checkpoints
        self.guard = guard
        self.observers = observers
        self.stop = stop
        self.step = self.start_step = start_step
        self.facts = facts or {}
        self.lost_tokens = 0
        self.epochs: Mapping[str, float] = {}

    def run(self) -> bool:
        """Train.

        Returns:
            Whether the run is complete (False: told to stop, and saved).

        Raises:
            StateXError: Too many steps in a row were skipped or had no target, a batch cannot be had (in each case the
                steps up to there are saved), or a checkpoint cannot be saved.
        """
        if self.step >= self.config.num_steps:
            return True
        fetched = self._fetch()
        if self._agree(fetched).no_batch:
            self._raise(fetched)
        self._tell_profiler()
        start, save_seconds = time.perf_counter(), 0.0
        while True:
            batch = fetched.batch
            record, end = self._train_step(batch)
            done = self.step == self.config.num_steps
            fetched = _Fetched() if done or end else self._fetch()
            agreed = self._agree(fetched)
            ends_badly = end is not None or agreed.no_batch
            last = done or agreed.stop or ends_badly
            record["time"] |= {"data": fetched.seconds, "save": save_seconds}
            now = time.perf_counter()
            # Before the save, so that a saved step has its record. The next record has the time of the save.
            self._report(record, batch, now - start)
            start = now
            save_seconds = self._save_if_due(
                batch,
                last=last,
                written=agreed.written,
                ends_badly=ends_badly,
                doubtful=isinstance(end, BadStepsError) or self.guard.in_a_row > 0,
            )
            self._tell_profiler()
            if end is not None:
                raise end.on_all_ranks(self.engine.rank)
            if agreed.no_batch:
                self._raise(fetched)
            if last:
                return done

    def _beat(self, phase: str) -> None:
        if self.observers.watchdog is not None:
            self.observers.watchdog.beat(phase, step=self.step + 1)

    def _tell_profiler(self) -> None:
        if self.observers.profiler is not None:
            self.observers.profiler.step(self.step)

    def _fetch(self) -> _Fetched:
        self._beat("data")
        start, fetched = time.perf_counter(), _Fetched()
        try:
            fetched.batch = next(self.batches)
        except StopIteration:
            fetched.problem = DataError(
                f"the data has ended before train.num_steps={self.config.num_steps}; give more data, or lower it"
            )
        except StateXError as error:
            fetched.problem = error
        except OSError as error:
            fetched.problem = StateXError(f"the data cannot be read: {os_error_text(error)}")
        fetched.seconds = time.perf_counter() - start
        return fetched

    def _agree(self, fetched: _Fetched) -> _Agreed:
        """Return what holds on any rank, or on all."""
        self._beat("agreement")
        pending = self.checkpoints.pending
        no_batch, stop, unwritten = self.engine.any_rank(
            fetched.problem is not None, self.stop.received, pending and not self.checkpoints.written()
        )
        return _Agreed(no_batch=no_batch, stop=stop, written=pending and not unwritten)

    def _raise(self, fetched: _Fetched) -> NoReturn:
        """Stop on all ranks with the reason of the one that has no batch."""
        mine = fetched.problem
        reports = self.engine.gather(None if mine is None else (str(mine), isinstance(mine, DataError)))
        first = next(report for report in reports if report is not None)
        text, of_data = first
        kind: type[StateXError] = DataError if of_data else StateXError
        if mine is not None:
            text, kind = str(mine), type(mine)
        error = kind(f"no batch for step {self.step + 1}: {text}")
        # Ranks that have another reason say theirs.
        error.agreed = self.engine.rank > 0 and (mine is None or reports[self.engine.rank] == first)
        raise error

    def _train_step(self, batch: list[PackedBatch]) -> tuple[dict[str, Any], StateXError | None]:
        """Run one optimizer step and return its record, and why the run ends with it, if it does."""
        if self.engine.counts:
            self.lost_tokens += sum(pack.lost_tokens for pack in batch)
        every = self.observers.states_every
        observe = every > 0 and ((self.step + 1) % every == 0 or self.step == self.start_step)
        self._beat("forward and backward")
        loss = self.engine.forward_backward(batch, observe_states=observe)
        norms = self.engine.grad_norms()
        grad_norm = sum(norm**2 for norm in norms.values()) ** 0.5
        reason = self.guard.judge(loss, grad_norm, targets=self.engine.num_targets)
        self._beat("optimizer step")
        with self.engine.timer.phase("step"):
            result = self.engine.step(skip=reason is not None)
        if reason is None and not result.updated:
            reason = "DeepSpeed found a gradient that is not finite"
        end = None
        if reason is None:
            self.guard.passed(grad_norm)
        else:
            end = self._skip(batch, reason)
        self.step += 1
        self.epochs = batch[-1].epochs
        return {
            "step": self.step,
            "loss": loss,
            "lr": result.lr,
            "grad_norm": grad_norm,
            "grad_norms": norms,
            "targets": self.engine.num_targets,
            "skipped": self.guard.skipped,
            "without_targets": self.guard.without_targets,
            "epochs": dict(self.epochs),
            "time": self.engine.timer.take(),
            **({"state_norms": states} if observe and (states := self.engine.state_norms()) else {}),
        }, end

    def _skip(self, batch: list[PackedBatch], reason: str) -> StateXError | None:
        """Count a step that updated nothing; return why the run ends with it, if it does."""
        step, bad = self.step + 1, self.engine.bad_pack()
        # The pack whose loss is not finite says more than the first one of rank 0.
        packs = self.engine.gather((bad is not None, batch[bad or 0].where))
        rank = next((rank for rank, (found, _) in enumerate(packs) if found), 0)
        where = f"rank {rank} has {packs[rank][1]}" if len(packs) > 1 else packs[rank][1]
        if reason == NO_TARGETS:
            return self.guard.skip_empty(step, batch, where)
        self.engine.carried.forget()
        return self.guard.skip_bad(step, reason, batch, where)

    def _save_if_due(
        self, batch: list[PackedBatch], *, last: bool, written: bool, ends_badly: bool, doubtful: bool
    ) -> float:
        """Save, or finish a save that a thread has written; return the seconds that it took.

        Args:
            batch: The batch of the step that was made.
            last: Whether the run ends here.
            written: Whether all ranks have written a save that is pending.
            ends_badly: Whether the run ends for another reason, so that a save that fails is only logged.
            doubtful: Whether the last step was bad, so that the save does not replace older ones.
        """
        start = time.perf_counter()
        if last or (self.config.save_every > 0 and self.step % self.config.save_every == 0):
            self._beat("save")
            if self.observers.metrics is not None:
                self.observers.metrics.flush()
            # The state travels with the batch: a loader that has already fetched ahead does not matter.
            state = {"loader": batch[-1].loader_state, "guard": self.guard.state_dict(), "schedule": dict(self.facts)}
            try:
                self.checkpoints.save(self.step, state, last=last, doubtful=doubtful)
            except CheckpointError as error:
                if not ends_badly:
                    raise
                if self.engine.rank == 0:
                    logger.error("%s", error)
            lost = self.engine.sum([float(self.lost_tokens)])[0]
            if lost and self.engine.rank == 0:
                logger.warning(
                    "%d tokens of damaged shards were skipped since the start at step %d", lost, self.start_step
                )
        elif written:
            self._beat("end of a save")
            self.checkpoints.finish()
        return time.perf_counter() - start

    def _report(self, record: dict[str, Any], batch: list[PackedBatch], seconds: float) -> None:
        if self.observers.metrics is not None:
            tokens = sum(pack.num_tokens for pack in batch) * self.engine.data_parallel_size
            record |= {
                "tokens": tokens,
                "seconds": seconds,
                "tokens_per_s": tokens / seconds,
                "memory_bytes": self.engine.peak_memory(),
            }
            self.observers.metrics.write(record)
