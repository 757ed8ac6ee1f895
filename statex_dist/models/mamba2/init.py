"""First values of a Mamba2 layer's tensors: of a fresh model, and of the rows that an expansion adds."""

from __future__ import annotations

import math

from statex_dist.models.distributions import Constant, Distribution, LogCount, Normal, TimeStep, Uniform
from statex_dist.models.mamba2.config import Mamba2Config


def first_value(
    suffix: str, shape: tuple[int, ...], *, config: Mamba2Config, layer_default: bool = False
) -> Distribution:
    """Return the distribution of the tensor ``suffix`` (name without the layer's prefix).

    The rules are transformers' ``Mamba2PreTrainedModel._init_weights``: steps log-uniform between ``time_step_min``
    and ``time_step_max``, ``A = 1..num_heads``, convolution and output projection uniform as torch draws them.

    Args:
        suffix: Name without the layer's prefix.
        shape: Shape of the tensor.
        config: The model's configuration.
        layer_default: Whether values are those of the layer by itself (torch's rules, ``dt_bias`` 1), which is what the
            StateX authors' script leaves, since it replaces modules after the model's initialisation has run.
    """
    conv_bound = 1 / math.sqrt(config.conv_kernel)
    if suffix.endswith("norm.weight") or suffix == "mixer.D":
        return Constant(1.0)
    if suffix == "mixer.A_log":
        return LogCount()
    if suffix == "mixer.dt_bias":
        if layer_default:
            return Constant(1.0)
        return TimeStep(config.time_step_min, config.time_step_max, config.time_step_floor)
    if suffix == "mixer.conv1d.weight" or (layer_default and suffix == "mixer.conv1d.bias"):
        return Uniform(conv_bound)
    if layer_default and suffix.startswith("mixer.in_proj"):
        return Uniform(1 / math.sqrt(config.hidden_size))
    if suffix.endswith(".bias"):
        return Constant(0.0)
    if suffix == "mixer.out_proj.weight":
        bound = 1 / math.sqrt(config.inner_size)
        if config.rescale_prenorm_residual:
            bound /= math.sqrt(config.num_hidden_layers)
        return Uniform(bound)
    return Normal(config.initializer_range)
