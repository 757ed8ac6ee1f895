"""Names and shapes of a Mamba2 model's tensors, as transformers writes them."""

from __future__ import annotations

from statex_dist.models.layout import Names, TensorSpec, Units
from statex_dist.models.mamba2.config import Mamba2Config

NAMES = Names(trunk="backbone", final_norm="norm_f")


def conv_parts(config: Mamba2Config, layer: int) -> tuple[tuple[str, int], ...]:
    """Return the channel parts ``x | B | C`` of the convolution."""
    grouped = config.n_groups * config.layer_geometry(layer).key_dim
    return (("x", config.inner_size), ("B", grouped), ("C", grouped))


def in_proj_parts(config: Mamba2Config, layer: int) -> tuple[tuple[str, int], ...]:
    """Return the row parts ``z | x | B | C | dt`` of ``in_proj``."""
    return (("z", config.inner_size), *conv_parts(config, layer), ("dt", config.num_heads))


def layer_tensors(config: Mamba2Config, layer: int) -> dict[str, TensorSpec]:
    """Return the tensors of one layer under the plan, by name without the layer's prefix.

    Tensor-parallel ranks share whole heads; B and C belong to groups of them.
    """
    hidden, inner, heads = config.hidden_size, config.inner_size, config.num_heads
    rows, channels = in_proj_parts(config, layer), conv_parts(config, layer)
    num_rows, num_channels = sum(n for _, n in rows), sum(n for _, n in channels)
    by_head, by_group = Units(heads), Units(config.n_groups)
    row_units = (by_head, by_head, by_group, by_group, by_head)
    conv_units = (by_head, by_group, by_group)
    specs = {
        "norm.weight": TensorSpec(shape=(hidden,), decay=False),
        "mixer.dt_bias": TensorSpec(shape=(heads,), decay=False, units=(by_head,)),
        "mixer.A_log": TensorSpec(shape=(heads,), decay=False, units=(by_head,)),
        "mixer.D": TensorSpec(shape=(heads,), decay=False, units=(by_head,)),
        "mixer.in_proj.weight": TensorSpec(shape=(num_rows, hidden), parts=rows, units=row_units),
    }
    if config.use_bias:
        specs["mixer.in_proj.bias"] = TensorSpec(shape=(num_rows,), parts=rows, decay=False, units=row_units)
    specs["mixer.conv1d.weight"] = TensorSpec(
        shape=(num_channels, 1, config.conv_kernel), parts=channels, decay=False, units=conv_units
    )
    if config.use_conv_bias:
        specs["mixer.conv1d.bias"] = TensorSpec(shape=(num_channels,), parts=channels, decay=False, units=conv_units)
    specs["mixer.norm.weight"] = TensorSpec(shape=(inner,), decay=False, units=(by_head,))
    specs["mixer.out_proj.weight"] = TensorSpec(shape=(hidden, inner), axis=1, units=(by_head,))
    if config.use_bias:
        # On every rank: it is added once, to the sum of the ranks' outputs.
        specs["mixer.out_proj.bias"] = TensorSpec(shape=(hidden,), decay=False)
    return specs
