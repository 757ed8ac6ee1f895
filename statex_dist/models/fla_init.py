"""First values of tensors in flash-linear-attention's models, where a family has no rule of its own."""

from __future__ import annotations

import math

from statex_dist.models.distributions import Constant, Distribution, Normal, Uniform
from statex_dist.models.fla import MIX_NAME, FLAConfig


def first_value(suffix: str, shape: tuple[int, ...], *, config: FLAConfig) -> Distribution:
    """Return the distribution of the tensor ``suffix`` (name without the layer's prefix).

    Matrices are N(0, initializer_range^2), biases 0, norms 1; convolutions take torch's own uniform rule, because at
    ``initializer_range`` four taps would all but silence keys and values. The mixing matrix starts at ``1/sqrt(r)``,
    StateX's merge of ``r`` heads expressed in M.
    """
    if "norm" in suffix:
        return Constant(1.0)
    if suffix == MIX_NAME:
        return Constant(shape[1] ** -0.5)
    if suffix.endswith(".bias"):
        return Constant(0.0)
    if "conv1d" in suffix:
        return Uniform(1 / math.sqrt(shape[-1]))
    return Normal(config.initializer_range)
