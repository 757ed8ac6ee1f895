"""First values of a KDA layer's tensors: flash-linear-attention's rules."""

from __future__ import annotations

from statex_dist.models import fla_init
from statex_dist.models.distributions import Constant, Distribution, LogUniform, TimeStep
from statex_dist.models.kda.config import KDAConfig


def first_value(suffix: str, shape: tuple[int, ...], *, config: KDAConfig) -> Distribution:
    """Return the distribution of the tensor ``suffix`` (name without the layer's prefix)."""
    if suffix == "attn.A_log":
        return Constant(0.0) if config.safe_gate else LogUniform(1.0, 16.0)
    if suffix == "attn.dt_bias":
        return TimeStep(0.001, 0.1, 1e-4)
    return fla_init.first_value(suffix, shape, config=config)
