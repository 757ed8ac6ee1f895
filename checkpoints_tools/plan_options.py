"""The plan options that ``statex plan`` and ``statex expand`` share, and their defaults."""

from __future__ import annotations

from statex_dist.errors import ConfigError
from statex_dist.models.config import ModelConfig
from statex_dist.models.kinds import family_of, make_plan
from statex_dist.state.plan import Init, Op

DEFAULT_EVERY = 6
DEFAULT_GROWTH = 4


def plan_model(
    config: ModelConfig,
    *,
    layers: str | None = None,
    factor: str | int | None = None,
    init: Init = "reinit",
    op: Op | None = None,
    seed: int = 0,
) -> ModelConfig:
    """Return ``config`` with the expansion that the options ask for.

    Args:
        config: The model.
        layers: A rule of :func:`statex_dist.state.plan.select_layers`; None is ``every:6`` (the paper's choice for
            GLA; layer 0 alone on a model of fewer layers).
        factor: A number or ``full`` (all heads of a GLA layer); None is ``full`` for operations on heads and 4 for
            ``grow_state`` (Mamba2: 128 -> 512, as in the paper).
        init: How the new state starts.
        op: The operation; None takes the family's own.
        seed: Seed of the random values.

    Raises:
        ConfigError: The options are wrong or do not fit the model.
    """
    if layers is None:
        layers = f"every:{DEFAULT_EVERY}"
    number: int | None
    if factor is None:
        chosen = op or family_of(config.MODEL_TYPE).expand.DEFAULT_OP
        number = DEFAULT_GROWTH if chosen == "grow_state" else None
    elif factor == "full":
        number = None
    else:
        try:
            number = int(factor)
        except ValueError:
            raise ConfigError(f"--factor {factor!r} is neither a whole number from 2 nor 'full'") from None
    return make_plan(config, layers=layers, factor=number, init=init, op=op, seed=seed)
