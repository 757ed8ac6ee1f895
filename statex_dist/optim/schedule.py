"""Learning-rate schedules with warm-up: transformers' own, under the names that their papers use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import get_scheduler

from statex_dist.config import check_finite
from statex_dist.errors import ConfigError


@dataclass(kw_only=True)
class ScheduleConfig:
    """How the learning rate goes.

    Attributes:
        name: ``cosine`` (to ``min_ratio``), ``wsd`` (warm-up, stable, linear decay over the last steps) or
            ``constant``; each after a linear warm-up.
        warmup_steps: Optimizer steps of the warm-up.
        decay_steps: Steps of the decay at the end of ``wsd``.
        min_ratio: Last learning rate relative to the peak (``cosine`` and ``wsd``).
    """

    name: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: int = 0
    decay_steps: int = 0
    min_ratio: float = 0.0

    def __post_init__(self) -> None:
        check_finite(self, "schedule")
        for name in ("warmup_steps", "decay_steps"):
            if getattr(self, name) < 0:
                raise ConfigError(f"schedule.{name} must be 0 or more, not {getattr(self, name)}")
        if not 0 <= self.min_ratio <= 1:
            raise ConfigError(f"schedule.min_ratio must lie in [0, 1], not {self.min_ratio}")
        if self.name == "wsd" and self.decay_steps == 0:
            raise ConfigError("schedule.decay_steps must be above 0 for the wsd schedule")


def build_schedule(
    optimizer: torch.optim.Optimizer, config: ScheduleConfig, *, num_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Return the schedule of a run of ``num_steps`` optimizer steps.

    Raises:
        ConfigError: Warm-up and decay together are longer than the run.
    """
    if config.warmup_steps + config.decay_steps > num_steps:
        raise ConfigError(
            f"schedule: warmup_steps={config.warmup_steps} + decay_steps={config.decay_steps} "
            f"exceed the run's {num_steps} steps"
        )
    names = {
        "cosine": ("cosine_with_min_lr", {"min_lr_rate": config.min_ratio}),
        "wsd": (
            "warmup_stable_decay",
            {"num_decay_steps": config.decay_steps, "min_lr_ratio": config.min_ratio, "decay_type": "linear"},
        ),
        "constant": ("constant_with_warmup", {}),
    }
    name, specific = names[config.name]
    arguments: dict[str, Any] = {"scheduler_specific_kwargs": specific} if specific else {}
    return get_scheduler(
        name, optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=num_steps, **arguments
    )
