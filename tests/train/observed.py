"""A run's callbacks without a run: they are given records as the loop would give them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from statex_dist.train.callback import Callback, Callbacks, Ending, RunContext

ENGINE: Any = SimpleNamespace(rank=0, world_size=1, device=torch.device("cpu"))


class Observed:
    """Callbacks that have been started, and take records.

    Args:
        run_dir: The run's directory.
        callbacks: The callbacks; those of a step itself (throughput, states) are left out.
        start_step: Steps done before.
        num_steps: Steps of the whole run.
    """

    def __init__(self, run_dir: Path, callbacks: list[Callback], *, start_step: int = 0, num_steps: int = 100):
        left = [callback for callback in callbacks if callback.order >= 60]
        self.callbacks, self.step = Callbacks(left, rank=0), start_step
        self.callbacks.attach(
            RunContext(
                run_dir=run_dir,
                engine=ENGINE,
                num_steps=num_steps,
                start_step=start_step,
                settings={"seed": 0},
                callbacks=self.callbacks,
            )
        )
        self.callbacks.call("on_start")

    def write(self, record: dict[str, Any]) -> None:
        """Take a step's record."""
        self.step = record["step"]
        self.callbacks.call("post_step", record)

    def flush(self) -> None:
        """Prepare for a checkpoint."""
        self.callbacks.call("on_save", self.step)

    def close(self) -> None:
        """End."""
        self.callbacks.end(Ending(state="complete", step=self.step))
