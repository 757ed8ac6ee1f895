"""First values of a MiniMax layer's tensors: transformers' rules."""

from __future__ import annotations

from statex_dist.models.distributions import Constant, Distribution, Normal
from statex_dist.models.lightning.config import LightningConfig
from statex_dist.models.lightning.layout import MIX_NAME


def first_value(suffix: str, shape: tuple[int, ...], *, config: LightningConfig) -> Distribution:
    """Return the distribution of the tensor ``suffix`` (name without the layer's prefix)."""
    if "norm" in suffix:
        return Constant(1.0)
    if suffix == MIX_NAME:
        return Constant(shape[1] ** -0.5)
    return Normal(config.initializer_range)
