"""First values of a Mamba2 layer's tensors: of a fresh model, and of the layers that an expansion re-initialises."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from statex_dist.models.mamba2.config import Mamba2Config
from statex_dist.models.random_init import normal, uniform


def initial_value(
    suffix: str, shape: Sequence[int], *, config: Mamba2Config, dtype: torch.dtype, rng: torch.Generator
) -> torch.Tensor:
    """Return first values for the tensor ``suffix`` (name without the layer's prefix).

    The rules are transformers' ``Mamba2PreTrainedModel._init_weights``: steps log-uniform between ``time_step_min``
    and ``time_step_max``, ``A = 1..num_heads``, convolution and output projection uniform as torch draws them.
    """
    if suffix.endswith("norm.weight") or suffix == "mixer.D":
        return torch.ones(*shape, dtype=dtype)
    if suffix == "mixer.A_log":
        return torch.arange(1, config.num_heads + 1, dtype=torch.float32).log().to(dtype)
    if suffix == "mixer.dt_bias":
        low, high = math.log(config.time_step_min), math.log(config.time_step_max)
        dt = (torch.rand(*shape, generator=rng) * (high - low) + low).exp().clamp(min=config.time_step_floor)
        return (dt + torch.log(-torch.expm1(-dt))).to(dtype)  # the inverse of softplus
    if suffix.endswith(".bias"):
        return torch.zeros(*shape, dtype=dtype)
    if suffix == "mixer.conv1d.weight":
        return uniform(shape, bound=1 / math.sqrt(config.conv_kernel), dtype=dtype, rng=rng)
    if suffix == "mixer.out_proj.weight":
        bound = 1 / math.sqrt(config.inner_size)
        if config.rescale_prenorm_residual:
            bound /= math.sqrt(config.num_hidden_layers)
        return uniform(shape, bound=bound, dtype=dtype, rng=rng)
    return normal(shape, std=config.initializer_range, dtype=dtype, rng=rng)
