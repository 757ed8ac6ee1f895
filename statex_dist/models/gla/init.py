"""First values of a GLA layer's tensors: of a fresh model, and of the layers that an expansion re-initialises."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from statex_dist.models.gla.config import GLAConfig
from statex_dist.models.gla.layout import MIX_NAME
from statex_dist.models.random_init import normal, uniform


def initial_value(
    suffix: str, shape: Sequence[int], *, config: GLAConfig, dtype: torch.dtype, rng: torch.Generator
) -> torch.Tensor:
    """Return first values for the tensor ``suffix`` (name without the layer's prefix).

    Matrices are N(0, initializer_range^2) as in flash-linear-attention, biases 0, norms 1; convolutions take torch's
    own uniform rule, because at ``initializer_range`` four taps would all but silence keys and values. The mixing
    matrix starts at ``1/sqrt(r)``, StateX's merge of ``r`` heads expressed in M.
    """
    if suffix.endswith("norm.weight") or "g_norm" in suffix:
        return torch.ones(*shape, dtype=dtype)
    if suffix == MIX_NAME:
        return torch.full(tuple(shape), shape[1] ** -0.5, dtype=dtype)
    if suffix.endswith(".bias"):
        return torch.zeros(*shape, dtype=dtype)
    if "conv1d" in suffix:
        return uniform(shape, bound=1 / math.sqrt(config.conv_size), dtype=dtype, rng=rng)
    return normal(shape, std=config.initializer_range, dtype=dtype, rng=rng)
