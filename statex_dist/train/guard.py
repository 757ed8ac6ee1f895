"""Steps whose numbers cannot be trusted: skipped, counted, kept for a look, and the end of the run if they go on."""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from statex_dist.checkpoint.archive import WRITE_ERRORS
from statex_dist.config import check_finite
from statex_dist.data.types import PackedBatch
from statex_dist.errors import ConfigError

logger = logging.getLogger(__name__)

BAD_BATCHES_DIR = "bad_batches"
_WINDOW = 64
_ENOUGH = 8


@dataclass(kw_only=True)
class GuardConfig:
    """When a step is skipped: its parameters stay as they were, and the run goes on with the next batch.

    Attributes:
        max_skipped: Steps in a row that may be skipped; one more ends the run. 0 ends it at the first.
        spike_factor: A gradient norm above so many times the median of the last 64 steps is skipped too; 0 skips only
            losses and gradients that are not finite.
    """

    max_skipped: int = 3
    spike_factor: float = 0.0

    def __post_init__(self) -> None:
        check_finite(self, "guard")
        if self.max_skipped < 0:
            raise ConfigError(f"guard.max_skipped must be 0 or more, not {self.max_skipped}")
        if self.spike_factor < 0 or 0 < self.spike_factor <= 1:
            raise ConfigError(f"guard.spike_factor must be 0 or above 1, not {self.spike_factor}")


class Guard:
    """Decides which steps are skipped; the same on all ranks, as loss and norms are.

    Args:
        config: When a step is skipped.
        run_dir: Where batches of skipped steps are kept.
        rank: This rank.
    """

    def __init__(self, config: GuardConfig, run_dir: Path, *, rank: int):
        self.config, self.directory, self.rank = config, run_dir / BAD_BATCHES_DIR, rank
        self.skipped = 0
        self.in_a_row = 0
        self._norms: deque[float] = deque(maxlen=_WINDOW)

    def judge(self, loss: float, grad_norm: float) -> str | None:
        """Return why a step is to be skipped, or None for a good one."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(grad_norm):
            return f"the gradient norm is {grad_norm}"
        if self.config.spike_factor and len(self._norms) >= _ENOUGH:
            usual = statistics.median(self._norms)
            if grad_norm > self.config.spike_factor * usual:
                return f"the gradient norm of {grad_norm:.3g} is more than {self.config.spike_factor:g} x {usual:.3g}"
        return None

    def passed(self, grad_norm: float) -> None:
        """Remember a step that has been made."""
        self._norms.append(grad_norm)
        self.in_a_row = 0

    def skip(self, step: int, reason: str, batches: Sequence[PackedBatch]) -> bool:
        """Count a skipped step and keep its batch.

        Args:
            step: The step, counted from 1.
            reason: What :meth:`judge` said.
            batches: This rank's packs.

        Returns:
            Whether the run may go on.
        """
        self.skipped += 1
        self.in_a_row += 1
        path = self.directory / f"step{step}-rank{self.rank}.pt"
        names = ("input_ids", "labels", "position_ids", "cu_seqlens", "seq_idx")
        packs = [{name: getattr(pack, name) for name in names} for pack in batches]
        content = {"step": step, "reason": reason, "packs": packs, "loader": batches[-1].loader_state}
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            torch.save(content, path)
        except WRITE_ERRORS as error:
            # One rank must not end where the others go on; the batch can be had again from the loader's state.
            logger.warning("the batch of step %d cannot be kept: %s", step, error)
        if self.rank == 0:
            logger.warning("step %d is skipped: %s (%d in a row); its batch: %s", step, reason, self.in_a_row, path)
        return self.in_a_row <= self.config.max_skipped

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs in order to decide alike."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "norms": list(self._norms)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
        self._norms = deque(state["norms"], maxlen=_WINDOW)
