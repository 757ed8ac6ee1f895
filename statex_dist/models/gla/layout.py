"""Names and shapes of a GLA model's tensors, as flash-linear-attention writes them."""

from __future__ import annotations

from statex_dist.models.fla import NAMES, block_tensors, mix_tensor
from statex_dist.models.gla.config import GATE_LOW_RANK_DIM, GLAConfig
from statex_dist.models.layout import TensorSpec, layer_units

__all__ = ["NAMES", "gate_norm_name", "layer_tensors"]


def gate_norm_name(config: GLAConfig) -> str:
    """Return the name of the output norm, which the public models change with ``fuse_norm``."""
    return "attn.g_norm_swish_gate.weight" if config.fuse_norm else "attn.g_norm.weight"


def layer_tensors(config: GLAConfig, layer: int) -> dict[str, TensorSpec]:
    """Return the tensors of one layer under the plan, by name without the layer's prefix."""
    geometry = config.layer_geometry(layer)
    hidden, keys, values = config.hidden_size, geometry.num_heads * geometry.key_dim, config.value_dim
    units = layer_units(geometry)
    by_key, by_value = (units.keys,), (units.values,)
    specs = {
        **mix_tensor(geometry.num_heads, geometry.values_per_key),
        "attn.q_proj.weight": TensorSpec(shape=(keys, hidden), units=by_key),
        "attn.k_proj.weight": TensorSpec(shape=(keys, hidden), units=by_key),
        "attn.v_proj.weight": TensorSpec(shape=(values, hidden), units=by_value),
        "attn.g_proj.weight": TensorSpec(shape=(values, hidden), units=by_value),
        "attn.gk_proj.0.weight": TensorSpec(shape=(GATE_LOW_RANK_DIM, hidden)),
        "attn.gk_proj.1.weight": TensorSpec(shape=(keys, GATE_LOW_RANK_DIM), units=by_key),
        "attn.gk_proj.1.bias": TensorSpec(shape=(keys,), decay=False, units=by_key),
        "attn.o_proj.weight": TensorSpec(shape=(hidden, values), axis=1, units=by_value),
        gate_norm_name(config): TensorSpec(shape=(geometry.value_dim,), decay=False, units=(units.norm,)),
    }
    if config.use_short_conv:
        for name, channels, cut in (("q", keys, by_key), ("k", keys, by_key), ("v", values, by_value)):
            shape = (channels, 1, config.conv_size)
            specs[f"attn.{name}_conv1d.weight"] = TensorSpec(shape=shape, decay=False, units=cut)
    return block_tensors(config, specs)
