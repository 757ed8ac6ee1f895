"""Names and shapes of a Gated DeltaNet model's tensors, as flash-linear-attention writes them."""

from __future__ import annotations

from statex_dist.models.delta_rule import conv_tensors
from statex_dist.models.fla import NAMES, block_tensors, mix_tensor
from statex_dist.models.gated_deltanet.config import GatedDeltaNetConfig
from statex_dist.models.layout import TensorSpec

__all__ = ["NAMES", "layer_tensors"]


def layer_tensors(config: GatedDeltaNetConfig, layer: int) -> dict[str, TensorSpec]:
    """Return the tensors of one layer under the plan, by name without the layer's prefix."""
    hidden, keys, values, heads = config.hidden_size, config.key_dim, config.value_dim, config.value_heads
    specs = {
        "attn.q_proj.weight": TensorSpec(shape=(keys, hidden)),
        "attn.k_proj.weight": TensorSpec(shape=(keys, hidden)),
        "attn.v_proj.weight": TensorSpec(shape=(values, hidden)),
        "attn.a_proj.weight": TensorSpec(shape=(heads, hidden)),
        "attn.b_proj.weight": TensorSpec(shape=(heads, hidden)),
        "attn.A_log": TensorSpec(shape=(heads,), decay=False),
        "attn.dt_bias": TensorSpec(shape=(heads,), decay=False),
        "attn.o_norm.weight": TensorSpec(shape=(config.head_value_dim,), decay=False),
        "attn.o_proj.weight": TensorSpec(shape=(hidden, values)),
        **conv_tensors(config),
    }
    if config.use_gate:
        specs["attn.g_proj.weight"] = TensorSpec(shape=(values, hidden))
    values_per_key = config.layer_geometry(layer).values_per_key
    return {**specs, **block_tensors(config), **mix_tensor(heads, values_per_key)}
