"""Names and shapes of a KDA model's tensors, as flash-linear-attention writes them."""

from __future__ import annotations

from statex_dist.models.delta_rule import conv_tensors
from statex_dist.models.fla import NAMES, block_tensors, mix_tensor
from statex_dist.models.kda.config import KDAConfig
from statex_dist.models.layout import TensorSpec, layer_units

__all__ = ["NAMES", "layer_tensors"]


def layer_tensors(config: KDAConfig, layer: int) -> dict[str, TensorSpec]:
    """Return the tensors of one layer under the plan, by name without the layer's prefix."""
    hidden, keys, values, heads = config.hidden_size, config.key_dim, config.value_dim, config.value_heads
    rank, geometry = config.head_value_dim, config.layer_geometry(layer)
    units = layer_units(geometry)
    by_key, by_head, by_value = (units.keys,), (units.heads,), (units.values,)
    specs = {
        "attn.A_log": TensorSpec(shape=(heads,), decay=False, units=by_head),
        **mix_tensor(heads, geometry.values_per_key),
        "attn.dt_bias": TensorSpec(shape=(config.gate_dim,), decay=False, units=by_head),
        "attn.q_proj.weight": TensorSpec(shape=(keys, hidden), units=by_key),
        "attn.k_proj.weight": TensorSpec(shape=(keys, hidden), units=by_key),
        "attn.v_proj.weight": TensorSpec(shape=(values, hidden), units=by_value),
        "attn.b_proj.weight": TensorSpec(shape=(heads, hidden), units=by_head),
        **conv_tensors(config, units),
        "attn.o_proj.weight": TensorSpec(shape=(hidden, values), axis=1, units=by_value),
        "attn.f_proj.0.weight": TensorSpec(shape=(rank, hidden)),
        "attn.f_proj.1.weight": TensorSpec(shape=(config.gate_dim, rank), units=by_head),
        "attn.g_proj.0.weight": TensorSpec(shape=(rank, hidden)),
        "attn.g_proj.1.weight": TensorSpec(shape=(values, rank), units=by_value),
        "attn.g_proj.1.bias": TensorSpec(shape=(values,), decay=False, units=by_value),
        "attn.o_norm.weight": TensorSpec(shape=(rank,), decay=False, units=(units.norm,)),
    }
    return block_tensors(config, specs)
