"""The training loop: batches in, steps out, a checkpoint now and then.

It knows an engine and an iterator of batches, and nothing of models, DeepSpeed or files.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from statex_dist.data.types import PackedBatch
from statex_dist.engine.base import TrainEngine, prune
from statex_dist.errors import ConfigError, DataError, StateXError
from statex_dist.train.metrics import Metrics
from statex_dist.train.signals import StopRequest

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class TrainConfig:
    """How long to train and how often to save.

    Attributes:
        num_steps: Optimizer steps of the whole run.
        save_every: Steps between checkpoints; 0 saves only at the end.
        keep_last: Checkpoints that are kept.
    """

    num_steps: int
    save_every: int = 0
    keep_last: int = 2

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ConfigError(f"train.num_steps must be 1 or more, not {self.num_steps}")
        if self.save_every < 0:
            raise ConfigError(f"train.save_every must be 0 or more, not {self.save_every}")
        if self.keep_last < 1:
            raise ConfigError(f"train.keep_last must be 1 or more, not {self.keep_last}")


class Trainer:
    """Runs optimizer steps until the run is complete or told to stop.

    Args:
        engine: Computes steps.
        batches: Yields this rank's packs of each global batch.
        config: How long, how often.
        checkpoints: Where checkpoints go.
        model_files: Text files that describe the model, stored with each checkpoint.
        metrics: Writes the figures; None on ranks above 0.
        stop: Whether this process was told to stop.
        start_step: Steps done before.
    """

    def __init__(
        self,
        engine: TrainEngine,
        batches: Iterator[list[PackedBatch]],
        config: TrainConfig,
        *,
        checkpoints: Path,
        model_files: Mapping[str, str],
        metrics: Metrics | None,
        stop: StopRequest,
        start_step: int = 0,
    ):
        self.engine = engine
        self.batches = batches
        self.config = config
        self.checkpoints = checkpoints
        self.model_files = model_files
        self.metrics = metrics
        self.stop = stop
        self.step = self.start_step = start_step
        self.lost_tokens = 0

    def run(self) -> bool:
        """Train.

        Returns:
            Whether the run is complete (False: told to stop, and saved).

        Raises:
            StateXError: The loss or the gradient is not finite; nothing is saved after that.
        """
        while self.step < self.config.num_steps:
            start = time.perf_counter()
            batch = self._next_batch()
            loss = self.engine.forward_backward(batch)
            self._require_finite("loss", loss)
            result = self.engine.step()
            self._require_finite("gradient norm", result.grad_norm)
            self.step += 1
            seconds = time.perf_counter() - start
            if self.metrics is not None:
                tokens = sum(pack.num_tokens for pack in batch) * self.engine.world_size
                self.metrics.write(
                    {
                        "step": self.step,
                        "loss": loss,
                        "lr": result.lr,
                        "grad_norm": result.grad_norm,
                        "tokens": tokens,
                        "seconds": seconds,
                        "tokens_per_s": tokens / seconds,
                    }
                )
            stopping = self.engine.any_rank(self.stop.received)
            due = self.config.save_every > 0 and self.step % self.config.save_every == 0
            if due or stopping or self.step == self.config.num_steps:
                self._save(batch)
            if stopping and self.step < self.config.num_steps:
                return False
        return True

    def _next_batch(self) -> list[PackedBatch]:
        """Return this rank's batch of the next step; if one rank has none, all stop with its reason."""
        batch: list[PackedBatch] = []
        problem = None
        try:
            batch = next(self.batches)
        except StateXError as error:
            problem = error
        if self.engine.any_rank(problem is not None):
            reports = self.engine.gather(None if problem is None else str(problem))
            reason = next(text for text in reports if text is not None)
            raise problem if problem is not None else DataError(reason)
        self.lost_tokens += sum(pack.lost_tokens for pack in batch)
        return batch

    def _require_finite(self, name: str, value: float) -> None:
        if not math.isfinite(value):
            raise StateXError(
                f"the {name} is {value} at step {self.step + 1}; resume from the last checkpoint with a lower "
                "optimizer.lr, or look at the data of that step"
            )

    def _save(self, batch: list[PackedBatch]) -> None:
        # The state travels with the batch: a loader that has already fetched ahead does not matter.
        state = {"loader": batch[-1].loader_state}
        target = self.engine.save(self.checkpoints, self.step, state, self.model_files)
        logger.info("saved %s", target)
        if lost := sum(self.engine.gather(self.lost_tokens)):
            logger.warning("%d tokens of damaged shards were skipped since the start at step %d", lost, self.start_step)
        if self.engine.rank == 0:
            prune(self.checkpoints, self.config.keep_last)
