"""The training loop: batches in, steps out, a checkpoint now and then.

It knows an engine, an iterator of batches and callbacks (:mod:`statex_dist.train.callback`), and nothing of models,
DeepSpeed or files. Whatever one rank alone finds out (bad data, a signal, files written) is agreed on once a step, in
one small all-reduce.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from statex_dist.batch import PackedBatch
from statex_dist.engine.base import TrainEngine
from statex_dist.engine.checkpoints import Checkpoints
from statex_dist.errors import CheckpointError, DataError, StateXError, os_error_text
from statex_dist.train.callback import Callbacks, Ending, RunContext
from statex_dist.train.config import TrainConfig
from statex_dist.train.guard import NO_TARGETS, BadStepsError, Guard
from statex_dist.train.status import StopRequest

logger = logging.getLogger(__name__)


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
        loader: Yields this data-parallel rank's packs of each global batch.
        config: How long, how often.
        run_dir: The run's directory.
        checkpoints: Saves.
        guard: Judges steps.
        callbacks: Look at steps.
        stop: Whether this process was told to stop.
        start_step: Steps done before; :meth:`resume` finds them out.
        facts: What the learning rate follows from; every checkpoint keeps it.
        settings: The resolved configuration, for callbacks.
    """

    def __init__(
        self,
        engine: TrainEngine,
        loader: Iterable[list[PackedBatch]],
        config: TrainConfig,
        *,
        run_dir: Path,
        checkpoints: Checkpoints,
        guard: Guard,
        callbacks: Callbacks,
        stop: StopRequest,
        start_step: int = 0,
        facts: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
    ):
        self.engine = engine
        self.loader: Any = loader
        self.config = config
        self.checkpoints = checkpoints
        self.guard = guard
        self.callbacks = callbacks
        self.stop = stop
        self.step = start_step
        self.facts = facts or {}
        self.lost_tokens = 0
        self.context = RunContext(
            run_dir=run_dir,
            engine=engine,
            num_steps=config.num_steps,
            start_step=start_step,
            settings=settings or {},
            callbacks=callbacks,
        )
        callbacks.attach(self.context)
        self._ended = False
        self.batches: Iterator[list[PackedBatch]] = iter(())

    def resume(self) -> dict[str, Any] | None:
        """Restore the run's newest checkpoint.

        Returns:
            Its values beside the engine's state, or None where the run has not saved anything yet.

        Raises:
            StateXError: A checkpoint is wrong, or of another run.
        """
        state = self.checkpoints.resume()
        if state is not None:
            self.step = self.context.start_step = state["step"]
            if "loader" in state:  # a checkpoint made of weights alone begins with the first sequence
                self.loader.load_state_dict(state["loader"])
            if "guard" in state:
                self.guard.load_state_dict(state["guard"])
            self.callbacks.load_state_dict(state.get("callbacks", {}))
        self.context.epochs = self.loader.passes()
        if self.step >= self.config.num_steps:
            logger.info(
                "%s has %d steps already, train.num_steps is %d",
                *(self.context.run_dir, self.step, self.config.num_steps),
            )
        return state

    def run(self) -> bool:
        """Train.

        Returns:
            Whether the run is complete (False: told to stop, and saved).

        Raises:
            StateXError: Too many steps in a row were skipped or had no target, none had one, a batch cannot be had (in
                each case the steps up to there are saved), a checkpoint cannot be saved, or a callback failed.
        """
        self.batches = iter(self.loader)
        try:
            self.callbacks.call("on_start")
            done = self._run()
            if done:
                self.guard.check_end(self.step)
            self.callbacks.end(self._ending("complete" if done else "preempted"))
        except (Exception, KeyboardInterrupt) as error:
            if isinstance(error, KeyboardInterrupt):  # the second one: the user does not want to wait for the save
                error = StateXError(
                    f"interrupted again at step {self.step}, before it was saved; the same command resumes "
                    "from the last checkpoint"
                )
            if not self._ended:
                self.callbacks.end(self._ending("failed", error))
            raise error
        finally:
            getattr(self.batches, "close", lambda: None)()
        if not done:
            logger.info("stopped at step %d of %d; the same command continues", self.step, self.config.num_steps)
        return done

    def _ending(self, state: Any, error: BaseException | None = None) -> Ending:
        self._ended = True
        return Ending(state=state, step=self.step, epochs=self.context.epochs, error=error)

    def _run(self) -> bool:
        """Make the steps; return whether the run is complete."""
        if self.step >= self.config.num_steps:
            return True
        fetched = self._fetch()
        if self._agree(fetched).no_batch:
            self._raise(fetched)
        save_seconds = 0.0
        while True:
            batch = fetched.batch
            record, end = self._train_step(batch)
            done = self.step == self.config.num_steps
            fetched = _Fetched() if done or end else self._fetch()
            agreed = self._agree(fetched)
            ends_badly = end is not None or agreed.no_batch
            last = done or agreed.stop or ends_badly
            record["time"] |= {"data": fetched.seconds, "save": save_seconds}
            # Before the save, so that a saved step has its record. The next record has the time of the save.
            self.callbacks.call("post_step", record)
            save_seconds = self._save_if_due(
                batch,
                last=last,
                written=agreed.written,
                ends_badly=ends_badly,
                doubtful=isinstance(end, BadStepsError) or self.guard.in_a_row > 0,
            )
            if end is not None:
                raise end.on_all_ranks(self.engine.rank)
            if agreed.no_batch:
                self._raise(fetched)
            if last:
                return done

    def _beat(self, phase: str) -> None:
        self.callbacks.call("on_phase", phase, self.step + 1)

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
        own = [pack for pack in batch if not pack.dummy]
        if self.engine.counts:
            self.lost_tokens += sum(pack.lost_tokens for pack in own)
        self.context.observe_states = False
        self.callbacks.call("pre_step", self.step + 1, tuple(own))
        self._beat("forward and backward")
        loss = self.engine.forward_backward(batch, observe_states=self.context.observe_states)
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
            end = self._skip(own, reason)
        self.step += 1
        self.context.epochs = batch[-1].epochs
        return {
            "step": self.step,
            "loss": loss,
            **({} if self.engine.router_loss is None else {"router_loss": self.engine.router_loss}),
            "lr": result.lr,
            "grad_norm": grad_norm,
            "grad_norms": norms,
            "targets": self.engine.num_targets,
            "skipped": self.guard.skipped,
            "without_targets": self.guard.without_targets,
            "epochs": dict(self.context.epochs),
            "time": self.engine.timer.take(),
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
        wanted, self.context.wanted = self.context.wanted, ""
        if last or wanted or (self.config.save_every > 0 and self.step % self.config.save_every == 0):
            self._beat("save")
            self.callbacks.call("on_save", self.step)
            # The state travels with the batch: a loader that has already fetched ahead does not matter.
            state = {"loader": batch[-1].loader_state, "guard": self.guard.state_dict(), "schedule": dict(self.facts)}
            if callbacks := self.callbacks.state_dict():
                state["callbacks"] = callbacks
            try:
                self.checkpoints.save(self.step, state, last=last, doubtful=doubtful, best=wanted == "best")
            except CheckpointError as error:
                if not ends_badly:
                    raise
                if self.engine.rank == 0:
                    logger.error("%s", error)
            lost = self.engine.sum([float(self.lost_tokens)])[0]
            if lost and self.engine.rank == 0:
                logger.warning(
                    "%d tokens of damaged shards were skipped since the start at step %d",
                    *(lost, self.context.start_step),
                )
        elif written:
            self._beat("end of a save")
            self.checkpoints.finish()
        self.context.lost_best |= self.checkpoints.lost_best
        self.checkpoints.lost_best = set()
        return time.perf_counter() - start
