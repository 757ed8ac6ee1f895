"""Names and shapes of a Gated DeltaNet model's tensors, as flash-linear-attention writes them."""

from __future__ import annotations

from statex_dist.models.delta_rule import conv_tensors
from statex_dist.models.fla import NAMES, block_tensors, mix_tensor
from statex_dist.models.gated_deltanet.config import GatedDeltaNetConfig
from statex_dist.models.layout import TensorSpec, layer_units

__all__ = ["NAMES", "layer_tensors"]


def layer_tensors(config: GatedDeltaNetConfig, layer: int) -> dict[str, TensorSpec]:
    """Return the tensors of one layer under the plan, by name without the layer's prefix."""
    hidden, keys, values, heads = config.hidden_size, config.key_dim, config.value_dim, config.value_heads
    geometry = config.layer_geometry(layer)
    units = layer_units(geometry)
    by_key, by_head, by_value = (units.keys,), (units.heads,), (units.values,)
    specs = {
        "attn.A_log": TensorSpec(shape=(heads,), decay=False, units=by_head),
        **mix_tensor(heads, geometry.values_per_key),
        "attn.dt_bias": TensorSpec(shape=(heads,), decay=False, units=by_head),
        "attn.q_proj.weight": TensorSpec(shape=(keys, hidden), units=by_key),
        "attn.k_proj.weight": TensorSpec(shape=(keys, hidden), units=by_key),
        "attn.v_proj.weight": TensorSpec(shape=(values, hidden), units=by_value),
        "attn.b_proj.weight": TensorSpec(shape=(heads, hidden), units=by_head),
        **conv_tensors(config, units),
        "attn.o_proj.weight": TensorSpec(shape=(hidden, values), axis=1, units=by_value),
        "attn.a_proj.weight": TensorSpec(shape=(heads, hidden), units=by_head),
    }
    if config.use_gate:
        specs["attn.g_proj.weight"] = TensorSpec(shape=(values, hidden), units=by_value)
    specs["attn.o_norm.weight"] = TensorSpec(shape=(config.head_value_dim,), decay=False, units=(units.norm,))
    return block_tensors(config, specs)
