"""Names and shapes of a MiniMax model's tensors, as transformers writes them; softmax layers are not listed."""

from __future__ import annotations

from statex_dist.models.layout import Names, TensorSpec, Units, layer_units
from statex_dist.models.lightning.config import LightningConfig

NAMES = Names(trunk="model", final_norm="norm", embedding="embed_tokens")

MIX_NAME = "self_attn.mix"
"""The mixing matrix M of a ``mix_heads`` layer (ours; public checkpoints have none)."""


def layer_tensors(config: LightningConfig, layer: int) -> dict[str, TensorSpec]:
    """Return the tensors of one Lightning layer under the plan, by name without the layer's prefix.

    ``qkv_proj`` holds, head by head of the original model, the rows of queries, keys and values.
    """
    hidden, inner, geometry = config.hidden_size, config.inner_size, config.layer_geometry(layer)
    heads = config.num_attention_heads
    keys = geometry.num_heads * geometry.key_dim
    rows = (("q", keys // heads), ("k", keys // heads), ("v", inner // heads))
    units = layer_units(geometry)
    by_value, channels = (units.values,), (Units(config.intermediate_size),)
    specs = {"input_layernorm.weight": TensorSpec(shape=(hidden,), decay=False)}
    if geometry.values_per_key > 1:
        specs[MIX_NAME] = TensorSpec(shape=(geometry.num_heads, geometry.values_per_key), decay=False)
    specs |= {
        "self_attn.qkv_proj.weight": TensorSpec(
            shape=(2 * keys + inner, hidden), parts=rows, blocks=heads, units=(units.keys, units.keys, units.values)
        ),
        "self_attn.out_proj.weight": TensorSpec(shape=(hidden, inner), axis=1, units=by_value),
        "self_attn.output_gate.weight": TensorSpec(shape=(inner, hidden), units=by_value),
        "self_attn.norm.weight": TensorSpec(shape=(inner,), decay=False, units=by_value),
        "post_attention_layernorm.weight": TensorSpec(shape=(hidden,), decay=False),
        "block_sparse_moe.gate.weight": TensorSpec(shape=(config.num_local_experts, hidden)),
    }
    expert_specs = {
        "w1": TensorSpec(shape=(config.intermediate_size, hidden), units=channels),
        "w2": TensorSpec(shape=(hidden, config.intermediate_size), axis=1, units=channels),
        "w3": TensorSpec(shape=(config.intermediate_size, hidden), units=channels),
    }
    for expert in range(config.num_local_experts):
        for name, spec in expert_specs.items():
            specs[f"block_sparse_moe.experts.{expert}.{name}.weight"] = spec
    return specs
