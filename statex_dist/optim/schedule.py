"""Learning-rate schedules with warm-up, by one formula.

Step ``s`` of a run (counted from 1) uses ``lr * f(t)`` with ``t = s - 1``, the steps before it, skipped ones included.
With ``W`` warm-up steps, ``D`` decay steps, the smallest ratio ``m`` and a schedule of ``N`` steps::

    t < W                    f = t / W                                             every schedule: from 0
    cosine     W <= t < N    f = m + (1 - m) * (1 + cos(pi * (t - W) / (N - W))) / 2
    wsd        W <= t < N-D  f = 1
               N-D <= t < N  f = m + (1 - m) * (N - t) / D
    constant   W <= t        f = 1
    cosine and wsd, N <= t   f = m
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from statex_dist.config import check_finite
from statex_dist.errors import ConfigError

logger = logging.getLogger(__name__)

TOLERANCE = 0.01
"""Relative change of the next learning rate that a resumed run may make without a warning."""


@dataclass(kw_only=True)
class ScheduleConfig:
    """The schedule of the learning rate; the module's docstring has the formula.

    Attributes:
        name: ``cosine`` (to ``min_ratio``), ``wsd`` (warm-up, stable, linear decay over the last steps) or
            ``constant``; each after a linear warm-up from 0.
        num_steps: Optimizer steps until the schedule has reached its end, from which on the learning rate stays at
            ``min_ratio`` of the peak (``constant`` stays at the peak); None for ``train.num_steps``.
        warmup_steps: Optimizer steps of the warm-up.
        decay_steps: Steps of the decay at the end of ``wsd``; without effect on the others.
        min_ratio: Last learning rate relative to the peak (``cosine`` and ``wsd``).
    """

    name: Literal["cosine", "wsd", "constant"] = "cosine"
    num_steps: int | None = None
    warmup_steps: int = 0
    decay_steps: int = 0
    min_ratio: float = 0.0

    def __post_init__(self) -> None:
        check_finite(self, "schedule")
        for name in ("warmup_steps", "decay_steps"):
            if getattr(self, name) < 0:
                raise ConfigError(f"schedule.{name} must be 0 or more, not {getattr(self, name)}")
        if self.num_steps is not None and self.num_steps < 1:
            raise ConfigError(f"schedule.num_steps must be 1 or more, or null, not {self.num_steps}")
        if not 0 <= self.min_ratio <= 1:
            raise ConfigError(f"schedule.min_ratio must lie in [0, 1], not {self.min_ratio}")
        if self.name == "wsd" and self.decay_steps == 0:
            raise ConfigError("schedule.decay_steps must be above 0 for the wsd schedule")

    def length(self, train_steps: int) -> int:
        """Return the steps of the schedule in a run of ``train_steps``.

        Raises:
            ConfigError: Warm-up and decay together are longer.
        """
        length = train_steps if self.num_steps is None else self.num_steps
        decay = self.decay_steps if self.name == "wsd" else 0
        if self.warmup_steps + decay > length:
            raise ConfigError(
                f"schedule: warmup_steps={self.warmup_steps}{f' + decay_steps={decay}' * bool(decay)} exceed the "
                f"schedule's {length} steps; lower them, or raise schedule.num_steps (default: train.num_steps)"
            )
        return length

    def factor(self, done: int, *, length: int) -> float:
        """Return the learning rate over its peak in the step after ``done`` ones, in a schedule of ``length`` steps."""
        if done < self.warmup_steps:
            return done / self.warmup_steps
        if self.name == "constant":
            return 1.0
        if done >= length:
            return self.min_ratio
        if self.name == "cosine":
            left = (1 + math.cos(math.pi * (done - self.warmup_steps) / (length - self.warmup_steps))) / 2
        else:
            left = min(1.0, (length - done) / self.decay_steps)
        return self.min_ratio + (1 - self.min_ratio) * left


def build_schedule(
    optimizer: torch.optim.Optimizer, config: ScheduleConfig, *, num_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Return the schedule of a run of ``num_steps`` optimizer steps.

    Raises:
        ConfigError: Warm-up and decay together are longer than the schedule.
    """
    length = config.length(num_steps)
    # A skipped step advances the schedule alone; torch warns of that as a mistake if it is the first step.
    warnings.filterwarnings("ignore", message=r"Detected call of `lr_scheduler\.step\(\)` before")
    # A function, not an object: torch saves the attributes of an object, and a resume would bring back the old ones.
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: config.factor(done, length=length))


def log_schedule(config: ScheduleConfig, *, num_steps: int) -> None:
    """Log which settings have no effect, and where the schedule ends if the run of ``num_steps`` ends elsewhere."""
    for name in {"cosine": ["decay_steps"], "constant": ["decay_steps", "min_ratio"]}.get(config.name, []):
        if value := getattr(config, name):
            logger.warning("schedule.%s=%s has no effect on a %s schedule", name, value, config.name)
    length = config.length(num_steps)
    if config.name == "constant" or length == num_steps:
        return
    if length > num_steps:
        last = config.factor(num_steps - 1, length=length)
        logger.info(
            "the schedule of %d steps is longer than the run: step %d has %.3g of the peak learning rate",
            *(length, num_steps, last),
        )
    elif config.min_ratio:
        logger.info(
            "from step %d to %d the learning rate stays at %g of its peak", *(length + 1, num_steps, config.min_ratio)
        )
    else:
        logger.warning(
            "from step %d to %d the learning rate is 0, and nothing is learned: the schedule has %d steps and "
            "schedule.min_ratio is 0",
            *(length + 1, num_steps, length),
        )


def schedule_facts(config: ScheduleConfig, *, lr: float, num_steps: int) -> dict[str, Any]:
    """Return the settings that decide the learning rate; a checkpoint keeps them to explain a change."""
    facts = {f"schedule.{name}": value for name, value in asdict(config).items()}
    return {"optimizer.lr": lr, **facts, "schedule.num_steps": config.length(num_steps)}


def warn_of_changed_rates(
    groups: Sequence[Mapping[str, Any]],
    saved: Sequence[float],
    *,
    saved_facts: Mapping[str, Any] | None,
    facts: Mapping[str, Any],
) -> None:
    """Warn if a resumed run's next learning rate differs from the one that its checkpoint would have used.

    Args:
        groups: The optimizer's parameter groups.
        saved: Learning rate of each that the checkpoint's next step would have had.
        saved_facts: :func:`schedule_facts` of the checkpoint; None if an earlier release wrote it.
        facts: Those of this start.
    """
    before, group = max(zip(saved, groups, strict=True), key=lambda pair: _change(pair[0], pair[1]["lr"]))
    if _change(before, group["lr"]) <= TOLERANCE:
        return
    if saved_facts is None:
        cause = "the checkpoint does not have the settings of its own schedule"
    else:
        differing = [f"{k} was {saved_facts.get(k)}, now {v}" for k, v in facts.items() if saved_facts.get(k) != v]
        cause = "; ".join(differing) or "optimizer.lr_factors differ"
    logger.warning(
        "the next step has the learning rate %.6g, and would have had %.6g before this start (parameter group %s): %s. "
        "To keep the old rate, restore these settings; schedule.num_steps sets the schedule's length apart from "
        "train.num_steps",
        *(group["lr"], before, group.get("name", "?"), cause),
    )


def _change(before: float, now: float) -> float:
    """Return the relative change of a learning rate; 1 from or to 0."""
    return 0.0 if before == now else abs(now - before) / max(abs(before), abs(now))
