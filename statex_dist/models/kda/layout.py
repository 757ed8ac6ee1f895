"""Names and shapes of a KDA model's tensors, as flash-linear-attention writes them."""

from __future__ import annotations

from statex_dist.models.delta_rule import conv_tensors
from statex_dist.models.fla import NAMES, block_tensors, mix_tensor
from statex_dist.models.kda.config import KDAConfig
from statex_dist.models.layout import TensorSpec

__all__ = ["NAMES", "layer_tensors"]


def layer_tensors(config: KDAConfig, layer: int) -> dict[str, TensorSpec]:
    """Return the tensors of one layer under the plan, by name without the layer's prefix."""
    hidden, keys, values, heads = config.hidden_size, config.key_dim, config.value_dim, config.value_heads
    rank = config.head_value_dim
    specs = {
        "attn.q_proj.weight": TensorSpec(shape=(keys, hidden)),
        "attn.k_proj.weight": TensorSpec(shape=(keys, hidden)),
        "attn.v_proj.weight": TensorSpec(shape=(values, hidden)),
        "attn.f_proj.0.weight": TensorSpec(shape=(rank, hidden)),
        "attn.f_proj.1.weight": TensorSpec(shape=(config.gate_dim, rank)),
        "attn.b_proj.weight": TensorSpec(shape=(heads, hidden)),
        "attn.A_log": TensorSpec(shape=(heads,), decay=False),
        "attn.dt_bias": TensorSpec(shape=(config.gate_dim,), decay=False),
        "attn.g_proj.0.weight": TensorSpec(shape=(rank, hidden)),
        "attn.g_proj.1.weight": TensorSpec(shape=(values, rank)),
        "attn.g_proj.1.bias": TensorSpec(shape=(values,), decay=False),
        "attn.o_norm.weight": TensorSpec(shape=(rank,), decay=False),
        "attn.o_proj.weight": TensorSpec(shape=(hidden, values)),
        **conv_tensors(config),
    }
    values_per_key = config.layer_geometry(layer).values_per_key
    return {**specs, **block_tensors(config), **mix_tensor(heads, values_per_key)}
