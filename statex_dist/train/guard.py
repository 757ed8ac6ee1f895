"""Steps that update nothing: they are counted and named with their data; too many end the run.

There are two kinds. A *bad* step has a loss or gradient norm that is not finite or too large; its batch is kept, and a
few in a row end the run. A step *without targets* has nothing to learn (a long masked stretch); many may follow one
another, but not a whole pass over the data.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from statex_dist.batch import PackedBatch
from statex_dist.checkpoint.formats.crc import WRITE_ERRORS
from statex_dist.config import check_finite
from statex_dist.errors import ConfigError, DataError, StateXError

logger = logging.getLogger(__name__)

BAD_BATCHES_DIR = "bad_batches"
NO_TARGETS = "no token of its batch is a target"
_WINDOW = 64
_ENOUGH = 8


class BadStepsError(StateXError):
    """Too many bad steps in a row; the run is saved, and a restart would only skip more steps."""

    restart = False


class NoTargetsError(DataError):
    """The data has no target, or none for too long; the run is saved, and a restart would find none either."""

    restart = False


@dataclass(kw_only=True)
class GuardConfig:
    """Rules for skipped steps: a skipped step changes no parameters, and the run continues with the next batch.

    Attributes:
        max_skipped: Bad steps in a row that may be skipped; one more ends the run. 0 ends it at the first.
        max_without_targets: Steps in a row without a target that may be skipped; one more ends the run, and so does a
            whole pass over the data without any.
        spike_factor: A step whose gradient norm is above this factor times the median of the last 64 steps is skipped
            too; 0 skips only losses and gradients that are not finite.
    """

    max_skipped: int = 3
    max_without_targets: int = 1000
    spike_factor: float = 0.0

    def __post_init__(self) -> None:
        check_finite(self, "guard")
        for name in ("max_skipped", "max_without_targets"):
            if getattr(self, name) < 0:
                raise ConfigError(f"guard.{name} must be 0 or more, not {getattr(self, name)}")
        if self.spike_factor < 0 or 0 < self.spike_factor <= 1:
            raise ConfigError(f"guard.spike_factor must be 0 or above 1, not {self.spike_factor}")


class Guard:
    """Decides which steps are skipped; the same on all ranks, as loss, norms and targets are.

    Args:
        config: When a step is skipped.
        run_dir: Where batches of bad steps are kept.
        rank: This rank.

    Attributes:
        skipped: Steps that updated nothing, of either kind.
        without_targets: Those of them that had no target.
        in_a_row: Bad steps in a row up to now; steps without targets are left out of account.
    """

    def __init__(self, config: GuardConfig, run_dir: Path, *, rank: int):
        self.config, self.directory, self.rank = config, run_dir / BAD_BATCHES_DIR, rank
        self.skipped = 0
        self.without_targets = 0
        self.in_a_row = 0
        self._empty_in_a_row = 0
        self._empty_since: dict[str, float] = {}
        self._norms: deque[float] = deque(maxlen=_WINDOW)

    def judge(self, loss: float, grad_norm: float, *, targets: int) -> str | None:
        """Return why a step must be skipped (:data:`NO_TARGETS`, or its bad value), or None for a good one."""
        if not math.isfinite(grad_norm):
            return f"the gradient norm is {grad_norm}" if targets == 0 or math.isfinite(loss) else f"the loss is {loss}"
        if targets == 0:
            return NO_TARGETS
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if self.config.spike_factor and len(self._norms) >= _ENOUGH:
            usual = statistics.median(self._norms)
            if grad_norm > self.config.spike_factor * usual:
                return f"the gradient norm of {grad_norm:.3g} is more than {self.config.spike_factor:g} x {usual:.3g}"
        return None

    def passed(self, grad_norm: float) -> None:
        """Remember a step that has been made."""
        self._norms.append(grad_norm)
        self.in_a_row = self._empty_in_a_row = 0

    def skip_empty(self, step: int, batches: Sequence[PackedBatch], where: str) -> StateXError | None:
        """Count a step without targets.

        Args:
            step: The step, counted from 1.
            batches: This rank's packs.
            where: What they are made of, for the message.

        Returns:
            Why the run ends here, or None.
        """
        self.skipped += 1
        self.without_targets += 1
        epochs, active = batches[-1].epochs, batches[-1].loader_state.get("weights", {})
        if self._empty_in_a_row == 0:
            self._empty_since = epochs
        self._empty_in_a_row = count = self._empty_in_a_row + 1
        if self.rank == 0 and count & (count - 1) == 0:  # at 1, 2, 4, 8 ... in a row
            logger.warning("step %d updates nothing: %s (%d in a row); %s", step, NO_TARGETS, count, where)
        whole = bool(active) and all(epochs[name] - self._empty_since.get(name, 0.0) >= 1 for name in active)
        if count <= self.config.max_without_targets and not whole:
            return None
        self._empty_in_a_row = 0
        limit = (
            "a whole pass over the data" if whole else f"guard.max_without_targets={self.config.max_without_targets}"
        )
        return NoTargetsError(
            f"none of the last {count} steps, to step {step}, had a target ({limit}): all tokens are masked, padding "
            f"or of damaged shards that were skipped; check the data's loss masks: {where}"
        )

    def skip_bad(self, step: int, reason: str, batches: Sequence[PackedBatch], where: str) -> StateXError | None:
        """Count a bad step and keep its batch.

        Args:
            step: The step, counted from 1.
            reason: What is bad.
            batches: This rank's packs.
            where: What is most likely to blame, for the message.

        Returns:
            Why the run ends here, or None. The count of bad steps in a row then begins again at 0.
        """
        self.skipped += 1
        self.in_a_row += 1
        path = self.directory / f"step{step}-rank{self.rank}.pt"
        names = ("input_ids", "labels", "position_ids", "cu_seqlens", "seq_idx")
        packs = [
            {
                **{name: getattr(pack, name) for name in names},
                "origins": [asdict(origin) for origin in pack.origins],
                "num_pieces": pack.num_pieces,
            }
            for pack in batches
        ]
        content = {"step": step, "reason": reason, "packs": packs, "loader": batches[-1].loader_state}
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            torch.save(content, path)
        except WRITE_ERRORS as error:
            # One rank must not end where the others continue. The loader's state gives the batch again.
            logger.warning("the batch of step %d cannot be kept: %s", step, error)
        if self.rank == 0:
            logger.warning(
                "step %d is skipped: %s (%d in a row); %s; its batch: %s", step, reason, self.in_a_row, where, path
            )
        if self.in_a_row <= self.config.max_skipped:
            return None
        before, self.in_a_row = self.in_a_row - 1, 0
        return BadStepsError(
            f"{reason} at step {step}, and {before} step(s) before it were skipped ({where}); start again with a lower "
            f"optimizer.lr, or inspect the batches in {self.directory}"
        )

    def check_end(self, step: int) -> None:
        """Say how many of all ``step`` steps of a complete run had no target.

        Raises:
            NoTargetsError: None had one.
        """
        if self.without_targets == step:
            raise NoTargetsError(
                f"none of the {step} steps had a target: the model is as it was; look at the data's loss masks"
            ).on_all_ranks(self.rank)
        if self.rank == 0 and self.without_targets:
            logger.warning("%d of %d steps had no target and updated nothing", self.without_targets, step)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs in order to decide alike."""
        return {
            "skipped": self.skipped,
            "without_targets": self.without_targets,
            "in_a_row": self.in_a_row,
            "norms": list(self._norms),
            "empty_in_a_row": self._empty_in_a_row,
            "empty_since": self._empty_since,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`; states from before steps without targets were counted have fewer keys."""
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
        self.without_targets = state.get("without_targets", 0)
        self._empty_in_a_row = state.get("empty_in_a_row", 0)
        self._empty_since = state.get("empty_since", {})
        self._norms = deque(state["norms"], maxlen=_WINDOW)
