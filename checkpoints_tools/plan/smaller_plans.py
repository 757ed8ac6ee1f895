"""Plans with a smaller state: fewer layers, a smaller factor, as much as fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from statex_dist.errors import ConfigError
from statex_dist.models.config import ModelConfig
from statex_dist.models.registry import make_plan, new_expansions
from statex_dist.state.plan import LayerExpansion


@dataclass(frozen=True, kw_only=True, slots=True)
class SmallerPlan:
    """A plan whose state fits the training length, and the options that give it."""

    op: str
    init: str
    factor: int
    layers: tuple[int, ...]
    state_numbers: int
    reset_dynamics: bool = False

    @property
    def options(self) -> str:
        """Options of ``statex plan`` and ``statex expand``."""
        layers = ",".join(map(str, self.layers))
        line = f"--layers {layers} --factor {self.factor} --op {self.op} --init {self.init}"
        return f"{line} --reset-dynamics" if self.reset_dynamics else line


def smaller_plans(
    before: ModelConfig, after: ModelConfig, fits: Callable[[int], bool]
) -> tuple[SmallerPlan, ...] | None:
    """Return plans of the same kind whose state fits: the largest state, the same layers, the same factor.

    Args:
        before: The model as it is.
        after: The model with the plan that is too large.
        fits: Whether so many state numbers fit; what does not fit does not fit when it grows.

    Returns:
        The plans, each once; None where the plan is not of one kind and factor.
    """
    if after.statex is None or after.statex == before.statex:
        return None
    planned = new_expansions(before, after).layers
    kinds = {(e.op, e.init, e.reset_dynamics) for e in planned}
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
    """Return a plan, or None where the family does not allow its factor."""
    try:
        after = make_plan(
            before,
            layers=",".join(map(str, layers)),
            factor=factor,
            init=like.init,
            op=like.op,
            reset_dynamics=like.reset_dynamics,
        )
    except ConfigError:
        return None
    return SmallerPlan(
        op=like.op,
        init=like.init,
        factor=factor,
        layers=layers,
        state_numbers=after.state_numbers,
        reset_dynamics=like.reset_dynamics,
    )
