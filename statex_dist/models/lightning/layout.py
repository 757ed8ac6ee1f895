"""Names and shapes of a MiniMax model's tensors, as transformers writes them; softmax layers are not listed."""

from __future__ import annotations

from statex_dist.models.layout import Names, TensorSpec
from statex_dist.models.lightning.config import LightningConfig

NAMES = Names(trunk="model", final_norm="norm", embedding="embed_tokens")

MIX_NAME = "self_attn.mix"
"""The mixing matrix M of a ``mix_heads`` layer (ours; public checkpoints have none)."""


def layer_tensors(config: LightningConfig, layer: int) -> dict[str, TensorSpec]:
    """Return the tensors of one Lightning layer under the plan, by name without the layer's prefix.

    ``qkv_proj`` holds, head by head, the rows of queries, keys and values.
    """
    hidden, inner, geometry = config.hidden_size, config.inner_size, config.layer_geometry(layer)
    keys = geometry.num_heads * geometry.key_dim
    specs = {
        "input_layernorm.weight": TensorSpec(shape=(hidden,), decay=False),
        "self_attn.qkv_proj.weight": TensorSpec(shape=(2 * keys + inner, hidden)),
        "self_attn.norm.weight": TensorSpec(shape=(inner,), decay=False),
        "self_attn.output_gate.weight": TensorSpec(shape=(inner, hidden)),
        "self_attn.out_proj.weight": TensorSpec(shape=(hidden, inner)),
        "post_attention_layernorm.weight": TensorSpec(shape=(hidden,), decay=False),
        "block_sparse_moe.gate.weight": TensorSpec(shape=(config.num_local_experts, hidden)),
    }
    for expert in range(config.num_local_experts):
        for name, shape in (
            ("w1", (config.intermediate_size, hidden)),
            ("w2", (hidden, config.intermediate_size)),
            ("w3", (config.intermediate_size, hidden)),
        ):
            specs[f"block_sparse_moe.experts.{expert}.{name}.weight"] = TensorSpec(shape=shape)
    if geometry.values_per_key > 1:
        specs[MIX_NAME] = TensorSpec(shape=(geometry.num_heads, geometry.values_per_key), decay=False)
    return specs
