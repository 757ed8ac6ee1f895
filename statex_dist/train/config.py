"""The section ``train``: how long to train and how often to save."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from statex_dist.checkpoint.layout import STACKS_DIR
from statex_dist.config import check_finite
from statex_dist.distributed.disks import Disks
from statex_dist.distributed.ranks import Ranks
from statex_dist.engine.checkpoint_retention import SavePolicy
from statex_dist.engine.segment_states import StatePassing
from statex_dist.errors import ConfigError, refusal
from statex_dist.train.callback import Callback
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
        keep_every: Steps between checkpoints that are never deleted; 0 for none.
        save_async: Whether training continues while a checkpoint is written, from a copy in host memory.
        save_retries: Further attempts of a rank whose files could not be written.
        hang_minutes: A phase of a step that takes longer ends the job, with the stacks of every rank; 0 never, None
            after two thirds of ``engine.timeout_minutes``, when collectives have not given up yet.
        shared_run_dir: Whether all ranks have the same ``run_dir``, which is tested at the start. ``false`` keeps the
            checkpoint files of each host's ranks in ``run_dir`` on the host's own disk.
        neighbor_copy: Whether each host's checkpoint files are copied to the next host's disk too, so that a run can
            be resumed without a host that is lost; needs ``shared_run_dir: false``.
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
    neighbor_copy: bool = False
    state_passing: float = 0.0

    def __post_init__(self) -> None:
        check_finite(self, "train")
        for name in ("num_steps", "keep_last"):
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name} must be 1 or more, not {getattr(self, name)}")
        for name in ("save_every", "keep_every", "save_retries", "hang_minutes"):
            if (getattr(self, name) or 0) < 0:
                raise ConfigError(f"train.{name} must be 0 or more, not {getattr(self, name)}")
        if self.neighbor_copy and self.shared_run_dir:
            raise ConfigError("train.neighbor_copy needs train.shared_run_dir false: a shared directory is on no host")
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

    def find_disks(self, run_dir: Path, ranks: Ranks) -> Disks | None:
        """Return which ranks have the same run directory, which is made, or None where it is a shared one.

        All ranks call it together.

        Raises:
            ConfigError: It cannot be made on one of them.
        """
        if self.shared_run_dir:
            return None
        problem = None
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            problem = f"run_dir {run_dir} cannot be made on rank {ranks.rank}: {refusal(error)}"
        if problem := next((text for text in ranks.gather(problem) if text), None):
            raise ConfigError(problem).on_all_ranks(ranks.rank)
        return Disks.find(run_dir, ranks)

    def build_passing(self, *, seed: int) -> StatePassing | None:
        """Return what passes states between sequences, or None."""
        return StatePassing(self.state_passing, seed) if self.state_passing else None

    def build_watchdog(self, run_dir: Path, *, rank: int, timeout_minutes: float) -> list[Callback]:
        """Return the watchdog of a rank, unless there is to be none.

        Args:
            run_dir: The run's directory.
            rank: This process.
            timeout_minutes: After which collectives give up.
        """
        minutes = timeout_minutes * 2 / 3 if self.hang_minutes is None else self.hang_minutes
        if not minutes:
            return []
        if minutes >= timeout_minutes:
            logger.warning(
                "train.hang_minutes=%g is not below engine.timeout_minutes=%g: collectives give up before the "
                "stacks of a hung rank are written",
                *(minutes, timeout_minutes),
            )
        return [Watchdog(60 * minutes, run_dir / STACKS_DIR, rank)]
