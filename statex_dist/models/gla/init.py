"""First values of a GLA layer's tensors: of a fresh model, and of the layers that an expansion re-initialises."""

from __future__ import annotations

import math

from statex_dist.models.distributions import Distribution, Uniform
from statex_dist.models.fla_init import first_value as fla_first_value
from statex_dist.models.gla.config import GLAConfig

XAVIER_GAIN = 2**-2.5
"""Of flash-linear-attention's GLA layer before a model's own initialisation runs over it."""


def first_value(suffix: str, shape: tuple[int, ...], *, config: GLAConfig, layer_default: bool = False) -> Distribution:
    """Return the distribution of the tensor ``suffix`` (name without the layer's prefix).

    Args:
        suffix: Name without the layer's prefix.
        shape: Shape of the tensor.
        config: The model's configuration.
        layer_default: Whether matrices are drawn as the layer does by itself (Xavier, gain 2^-2.5), which is what the
            StateX authors' script leaves, since it replaces layers after the model's initialisation has run.
    """
    if layer_default and "proj" in suffix and suffix.endswith(".weight"):
        return Uniform(XAVIER_GAIN * math.sqrt(6 / sum(shape)))
    return fla_first_value(suffix, shape, config=config)
