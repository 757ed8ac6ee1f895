"""Learning-rate schedules with warm-up, by one formula.

Step ``s`` of a run (counted from 1) uses ``lr * f(t)`` with ``t = s - 1``, the steps before it, skipped ones included.
With ``W`` warm-up steps, ``D`` decay steps, the smallest ratio ``m`` and a schedule of ``N`` steps::

    t < W                    f = t / W                                             every schedule: from 0
    cosine     W <= t < N    f = m + (1 - m) * (1 + cos(pi * (t - W) / (N - W))) / 2
    wsd        W <= t < N-D  f = 1
               N-D <= t < N  f = m + (1 - m) * (N - t) / D
    constant   W <= t        f = 1
    cosine and wsd, N <= t   f = m

:data:`SCHEDULES` has the functions behind the warm-up.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from statex_dist.config import check_finite
from statex_dist.errors import ConfigError, reason
from statex_dist.registry import Registry

logger = logging.getLogger(__name__)

TOLERANCE = 0.01
"""Relative change of the next learning rate that a resumed run may make without a warning."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """The form of a schedule after its warm-up.

    Attributes:
        factor: Returns the learning rate over its peak from the settings, the steps before this one and the steps of
            the schedule (and the options, as keywords).
        unused: Settings of :class:`ScheduleConfig` without an effect on it.
        ends: Whether it stays at ``min_ratio`` once its steps are over.
    """

    factor: Callable[..., float]
    unused: tuple[str, ...] = ()
    ends: bool = True


def cosine(config: ScheduleConfig, done: int, length: int) -> float:
    """Fall by half a cosine."""
    left = (1 + math.cos(math.pi * (done - config.warmup_steps) / (length - config.warmup_steps))) / 2
    return config.min_ratio + (1 - config.min_ratio) * left


def wsd(config: ScheduleConfig, done: int, length: int) -> float:
    """Stay at the peak, then fall linearly in the last steps."""
    return config.min_ratio + (1 - config.min_ratio) * min(1.0, (length - done) / config.decay_steps)


def constant(config: ScheduleConfig, done: int, length: int) -> float:
    """Stay at the peak."""
    return 1.0


SCHEDULES = Registry(
    "schedule.name",
    {
        "cosine": Shape(factor=cosine, unused=("decay_steps",)),
        "wsd": Shape(factor=wsd),
        "constant": Shape(factor=constant, unused=("decay_steps", "min_ratio"), ends=False),
    },
)
"""Each is a :class:`Shape`, or its ``factor`` alone."""


@dataclass(kw_only=True)
class ScheduleConfig:
    """The schedule of the learning rate; the module's docstring has the formula.

    Attributes:
        name: ``cosine`` (to ``min_ratio``), ``wsd`` (warm-up, stable, linear decay over the last steps), ``constant``,
            a registered one or ``module:function``; each after a linear warm-up from 0.
        options: Further arguments of its function, by name.
        num_steps: Optimizer steps until the schedule has reached its end, from which on the learning rate stays at
            ``min_ratio`` of the peak (``constant`` stays at the peak); None for ``train.num_steps``.
        warmup_steps: Optimizer steps of the warm-up.
        decay_steps: Steps of the decay at the end of ``wsd``; without effect on the others.
        min_ratio: Last learning rate relative to the peak (``cosine`` and ``wsd``).
    """

    name: str = "cosine"
    options: dict[str, Any] = field(default_factory=dict)
    num_steps: int | None = None
    warmup_steps: int = 0
    decay_steps: int = 0
    min_ratio: float = 0.0

    def __post_init__(self) -> None:
        check_finite(self, "schedule")
        SCHEDULES.check(self.name)
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

    def factor(self, done: int, *, length: int, shape: Shape | None = None) -> float:
        """Return the learning rate over its peak in the step after ``done`` ones, in a schedule of ``length`` steps.

        Raises:
            ConfigError: The schedule's function fails, or gives no learning rate.
        """
        if done < self.warmup_steps:
            return done / self.warmup_steps
        shape = shape or self.shape
        if shape.ends and done >= length:
            return self.min_ratio
        try:
            factor = float(shape.factor(self, done, length, **self.options))
        except Exception as error:  # a user's function may fail in any way
            raise ConfigError(f"schedule.name {self.name} fails for step {done + 1}: {reason(error)}") from None
        if not 0 <= factor < math.inf:
            raise ConfigError(f"schedule.name {self.name} gives {factor} for step {done + 1}: a factor is 0 or more")
        return factor

    @property
    def shape(self) -> Shape:
        """The form of the schedule after its warm-up.

        Raises:
            ConfigError: It cannot be imported, or is no function.
        """
        found = SCHEDULES.get(self.name)
        if not isinstance(found, Shape) and not callable(found):
            raise ConfigError(f"schedule.name {self.name} is neither a Shape nor a function")
        return found if isinstance(found, Shape) else Shape(factor=found, ends=False)

    def build(self, optimizer: torch.optim.Optimizer, *, num_steps: int) -> torch.optim.lr_scheduler.LambdaLR:
        """Return the schedule of a run of ``num_steps`` optimizer steps.

        Raises:
            ConfigError: Warm-up and decay together are longer than the schedule, or its function fails or does not
                take the options.
        """
        length, shape = self.length(num_steps), self.shape
        with contextlib.suppress(ValueError):  # the function of an extension has no signature
            try:
                inspect.signature(shape.factor).bind(self, 0, length, **self.options)
            except TypeError as error:
                raise ConfigError(f"schedule.name {self.name} fails with its options: {reason(error)}") from None
        self.factor(self.warmup_steps, length=length, shape=shape)

        def factor(done: int) -> float:
            try:
                return self.factor(done, length=length, shape=shape)
            except ConfigError:
                if done < num_steps:
                    raise
                return 0.0  # torch asks for the rate of a step after the last one

        # A skipped step advances the schedule alone; torch warns of that as a mistake if it is the first step.
        warnings.filterwarnings("ignore", message=r"Detected call of `lr_scheduler\.step\(\)` before")
        # A function, not an object: torch saves an object's attributes, and a resume would bring back the old ones.
        return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

    def facts(self, *, num_steps: int) -> dict[str, Any]:
        """Return the settings that decide the learning rate of a run; a checkpoint keeps them to explain a change."""
        # Options only where there are some: checkpoints without them stay as earlier releases wrote them.
        facts = {f"schedule.{name}": value for name, value in asdict(self).items() if name != "options" or value}
        return {**facts, "schedule.num_steps": self.length(num_steps)}


def log_schedule(config: ScheduleConfig, *, num_steps: int) -> None:
    """Log which settings have no effect, and where the schedule ends if the run of ``num_steps`` ends elsewhere."""
    for name in config.shape.unused:
        if value := getattr(config, name):
            logger.warning("schedule.%s=%s has no effect on a %s schedule", name, value, config.name)
    length = config.length(num_steps)
    if not config.shape.ends or length == num_steps:
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
        saved_facts: What a checkpoint keeps of them; None if an earlier release wrote it.
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
