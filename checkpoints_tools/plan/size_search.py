"""Finding an expansion that brings all states together to a wanted size.

Expanded layers are spaced evenly from the first, as in the paper; of the plans that come equally close the one with the
fewest layers is taken (the largest factor).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from statex_dist.errors import ConfigError
from statex_dist.models.config import ModelConfig
from statex_dist.models.registry import make_plan, new_expansions
from statex_dist.state.geometry import FeatureMap, largest_roll
from statex_dist.state.plan import Init, LayerExpansion, Op, select_layers

TOLERANCE = 0.05
"""Largest relative distance from the wanted size."""

LARGEST_GROWTH = 16
"""Largest factor that is tried: of ``grow_state`` powers of two, of ``grow_features`` every number (operations on heads
end at their number)."""

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundPlan:
    """Layers and factor that come closest, and the state elements that they give."""

    layers: tuple[int, ...]
    factor: int
    numbers: int


def parse_target(text: str, current: int) -> float:
    """Return the state elements that ``1.5x`` (of ``current``), ``18.7M`` or ``18700000`` asks for.

    Raises:
        ConfigError: Neither form, or not more than the current size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(x|[KMG]?)", text.strip())
    if match is None:
        raise ConfigError(
            f"--target-state {text!r} is not a size; give a multiple such as 1.5x, or numbers such as 18.7M"
        )
    wanted = float(match[1]) * (current if match[2] == "x" else _UNITS[match[2]])
    if not math.isfinite(wanted):
        raise ConfigError(f"--target-state {text[:20]}... is out of all proportion")
    if wanted <= current:
        raise ConfigError(f"--target-state {text}: the model has {current:,} state elements already; ask for more")
    return wanted


def find_plan(
    config: ModelConfig, target: str, *, layers: str | None, factor: int | None, op: Op, init: Init
) -> FoundPlan:
    """Return the plan whose total state is closest to a target.

    Args:
        config: The model.
        target: ``1.5x`` or a number of state elements.
        layers: A rule that fixes the layers; None leaves them free.
        factor: A factor that is fixed; None leaves it free.
        op: The operation.
        init: The initialisation.

    Raises:
        ConfigError: No plan comes within :data:`TOLERANCE`; the closest is named.
    """
    wanted = parse_target(target, config.state_elements)
    taken = {e.layer for e in config.statex.layers} if config.statex else set()
    free = [layer for layer in config.recurrent_layers if layer not in taken]
    if not free:
        raise ConfigError(f"--target-state {target}: every recurrent layer is expanded already")
    if layers is not None:
        choices = [select_layers(layers, config.num_hidden_layers, config.recurrent_layers)]
    else:
        choices = [_spread(free, count) for count in range(1, len(free) + 1)]
    found: list[FoundPlan] = []
    for number in [factor] if factor is not None else _factors(config, free[0], op):
        for chosen in choices:
            try:
                after = make_plan(config, layers=",".join(map(str, chosen)), factor=number, init=init, op=op)
            except ConfigError:
                if factor is not None:
                    raise
                break
            found.append(FoundPlan(layers=chosen, factor=number, numbers=after.state_elements))
    best = min(found, key=lambda plan: (abs(plan.numbers - wanted), len(plan.layers)), default=None)
    if best is None or abs(best.numbers - wanted) > TOLERANCE * wanted:
        closest = f"the closest is {best.factor} times in layers {list(best.layers)}" if best else "no factor fits"
        reached = f" ({best.numbers / config.state_elements:.2f}x)" if best else ""
        raise ConfigError(f"--target-state {target}: no plan of op {op} comes within 5 %; {closest}{reached}")
    return best


def _spread(layers: list[int], count: int) -> tuple[int, ...]:
    """Return ``count`` of ``layers``, evenly spaced from the first."""
    return tuple(layers[index * len(layers) // count] for index in range(count))


def _factors(config: ModelConfig, layer: int, op: Op) -> list[int]:
    if op == "grow_state":
        return [2**power for power in range(1, LARGEST_GROWTH.bit_length())]
    geometry = config.replace(statex=None).layer_geometry(layer)
    most = min(largest_roll(geometry.key_dim) + 2, LARGEST_GROWTH) if op == "grow_features" else geometry.num_heads
    return list(range(2, most + 1))


@dataclass(frozen=True, kw_only=True, slots=True)
class SmallerPlan:
    """A plan whose state fits the training length, and the options that give it."""

    op: str
    init: str
    factor: int
    layers: tuple[int, ...]
    state_numbers: int
    reset_dynamics: bool = False
    features: FeatureMap | None = None

    @property
    def options(self) -> str:
        """Options of ``statex plan`` and ``statex expand``."""
        layers = ",".join(map(str, self.layers))
        line = f"--layers {layers} --factor {self.factor} --op {self.op} --init {self.init}"
        if self.features is not None:
            rolls = ",".join(map(str, self.features.rolls))
            # The factor stands for its first rolls.
            given = {f"--rolls {rolls}": self.features.rolls != (*range(1, self.factor),)}
            given |= {"--relu": self.features.relu, "--match-norm": self.features.match_norm}
            line = " ".join([line, *(option for option, said in given.items() if said)])
        return f"{line} --reset-dynamics" if self.reset_dynamics else line


def smaller_plans(
    before: ModelConfig, after: ModelConfig, fits: Callable[[int], bool]
) -> tuple[SmallerPlan, ...] | None:
    """Return plans of the same kind whose state fits: the largest state, the same layers, the same factor.

    Args:
        before: The model as it is.
        after: The model with the plan that is too large.
        fits: Whether a number of state elements fits; what does not fit does not fit when it grows.

    Returns:
        The plans, each once; None where the plan is not of one kind and factor.
    """
    if after.statex is None or after.statex == before.statex:
        return None
    planned = new_expansions(before, after).layers
    kinds = {(e.op, e.init, e.reset_dynamics, e.features) for e in planned}
    if len(kinds) != 1 or len({e.factor for e in planned}) != 1:
        return None
    (first,), layers = planned[:1], tuple(e.layer for e in planned)
    factors = range(2, first.factor + 1)
    plans = (_largest_fitting(before, first, factor, layers, fits) for factor in factors)
    fitting = [plan for plan in plans if plan is not None]
    fitting.sort(key=lambda plan: (-plan.state_numbers, len(plan.layers)))
    best = [
        next(iter(fitting), None),
        next((plan for plan in fitting if plan.layers == layers), None),
        next((plan for plan in fitting if plan.factor == first.factor), None),
    ]
    return tuple(dict.fromkeys(plan for plan in best if plan is not None))


def _largest_fitting(
    before: ModelConfig,
    like: LayerExpansion,
    factor: int,
    layers: tuple[int, ...],
    fits: Callable[[int], bool],
) -> SmallerPlan | None:
    """Return the plan of the most of the given layers, evenly spread, that fits, or None."""
    best, low, high = None, 1, len(layers)
    while low <= high:  # the state grows with the number of layers
        count = (low + high) // 2
        plan = _try(before, like, factor, tuple(layers[i * len(layers) // count] for i in range(count)))
        if plan is not None and fits(plan.state_numbers):
            best, low = plan, count + 1
        else:
            high = count - 1
    return best


def _try(before: ModelConfig, like: LayerExpansion, factor: int, layers: tuple[int, ...]) -> SmallerPlan | None:
    """Return a plan, or None where the family does not allow its factor; of features it has the first."""
    features = None if like.features is None else replace(like.features, rolls=like.features.rolls[: factor - 1])
    try:
        after = make_plan(
            before,
            layers=",".join(map(str, layers)),
            factor=factor,
            init=like.init,
            op=like.op,
            reset_dynamics=like.reset_dynamics,
            features=features,
        )
    except ConfigError:
        return None
    return SmallerPlan(
        op=like.op,
        init=like.init,
        factor=factor,
        layers=layers,
        state_numbers=after.state_elements,
        reset_dynamics=like.reset_dynamics,
        features=features,
    )
