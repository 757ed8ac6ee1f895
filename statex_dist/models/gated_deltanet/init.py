"""First values of a Gated DeltaNet layer's tensors: flash-linear-attention's rules."""

from __future__ import annotations

from statex_dist.models import fla_init
from statex_dist.models.distributions import Distribution, LogUniform, TimeStep
from statex_dist.models.gated_deltanet.config import GatedDeltaNetConfig


def first_value(suffix: str, shape: tuple[int, ...], *, config: GatedDeltaNetConfig) -> Distribution:
    """Return the distribution of the tensor ``suffix`` (name without the layer's prefix)."""
    if suffix == "attn.A_log":
        return LogUniform(0.0, 16.0)
    if suffix == "attn.dt_bias":
        return TimeStep(0.001, 0.1, 1e-4)
    return fla_init.first_value(suffix, shape, config=config)
