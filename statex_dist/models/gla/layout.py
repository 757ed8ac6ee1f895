"""Names and shapes of a GLA model's tensors, as flash-linear-attention writes them."""

from __future__ import annotations

from statex_dist.models.gla.config import GATE_LOW_RANK_DIM, GLAConfig
from statex_dist.models.layout import Names, TensorSpec

NAMES = Names(trunk="model", final_norm="norm")

MIX_NAME = "attn.mix"
"""The mixing matrix M of a ``mix_heads`` layer (ours; public checkpoints have none)."""


def gate_norm_name(config: GLAConfig) -> str:
    """Return the name of the output norm, which the public models change with ``fuse_norm``."""
    return "attn.g_norm_swish_gate.weight" if config.fuse_norm else "attn.g_norm.weight"


def layer_tensors(config: GLAConfig, layer: int) -> dict[str, TensorSpec]:
    """Return the tensors of one layer under the plan, by name without the layer's prefix."""
    hidden, keys, values = config.hidden_size, config.key_dim, config.value_dim
    geometry = config.layer_geometry(layer)
    specs = {
        "attn_norm.weight": TensorSpec(shape=(hidden,), decay=False),
        "attn.q_proj.weight": TensorSpec(shape=(keys, hidden)),
        "attn.k_proj.weight": TensorSpec(shape=(keys, hidden)),
        "attn.v_proj.weight": TensorSpec(shape=(values, hidden)),
        "attn.g_proj.weight": TensorSpec(shape=(values, hidden)),
        "attn.gk_proj.0.weight": TensorSpec(shape=(GATE_LOW_RANK_DIM, hidden)),
        "attn.gk_proj.1.weight": TensorSpec(shape=(keys, GATE_LOW_RANK_DIM)),
        "attn.gk_proj.1.bias": TensorSpec(shape=(keys,), decay=False),
        gate_norm_name(config): TensorSpec(shape=(geometry.value_dim,), decay=False),
        "attn.o_proj.weight": TensorSpec(shape=(hidden, values)),
        "mlp_norm.weight": TensorSpec(shape=(hidden,), decay=False),
        "mlp.gate_proj.weight": TensorSpec(shape=(config.mlp_size, hidden)),
        "mlp.up_proj.weight": TensorSpec(shape=(config.mlp_size, hidden)),
        "mlp.down_proj.weight": TensorSpec(shape=(hidden, config.mlp_size)),
    }
    if config.use_short_conv:
        for name, channels in (("q", keys), ("k", keys), ("v", values)):
            specs[f"attn.{name}_conv1d.weight"] = TensorSpec(shape=(channels, 1, config.conv_size), decay=False)
    if geometry.values_per_key > 1:
        specs[MIX_NAME] = TensorSpec(shape=(geometry.num_heads, geometry.values_per_key), decay=False)
    return specs
