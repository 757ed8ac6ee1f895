"""Expansion of a Lightning layer, as recipes.

The state is that of linear attention with a fixed decay, so everything that holds for GLA holds here
(:mod:`statex_dist.models.gla.expand`). Queries, keys and values of a head stand together in ``qkv_proj``; the output
norm runs over all heads, so merging heads changes no tensor.
"""

from __future__ import annotations

from functools import partial

from statex_dist.models.distributions import Constant
from statex_dist.models.fla import MIX_NAME as FLA_MIX_NAME
from statex_dist.models.fla_expand import mix_recipe, redrawn_tensors, renewed_norms
from statex_dist.models.lightning.config import LightningConfig
from statex_dist.models.lightning.init import first_value
from statex_dist.models.lightning.layout import MIX_NAME, layer_tensors
from statex_dist.models.recipe import Block, Fresh, Keep, Recipe, from_blocks
from statex_dist.state.plan import LayerExpansion

QKV = "self_attn.qkv_proj.weight"
TOKEN_MIXING = (QKV, "self_attn.output_gate.weight", "self_attn.out_proj.weight")


def layer_recipes(config: LightningConfig, after: LightningConfig, expansion: LayerExpansion) -> dict[str, Recipe]:
    """Return a recipe for each tensor of an expanded layer that changes or is new, by name without the prefix.

    Args:
        config: Configuration of the original model.
        after: Configuration of the expanded model.
        expansion: What is done to the layer.
    """
    before, target = layer_tensors(config, expansion.layer), layer_tensors(after, expansion.layer)
    mixed = mix_recipe(expansion, config.num_attention_heads)
    recipes = {MIX_NAME: mixed[FLA_MIX_NAME]} if mixed else {}
    if expansion.init == "reinit":
        recipes |= redrawn_tensors(before, target, TOKEN_MIXING, partial(first_value, config=config))
    elif expansion.op == "grow_state":
        recipes[QKV] = _grown_qkv(config, expansion, before[QKV].shape)
    norms = renewed_norms(expansion, before, target, norm="input_layernorm.weight", output_norm="self_attn.norm.weight")
    return recipes | norms


def _grown_qkv(config: LightningConfig, expansion: LayerExpansion, shape: tuple[int, ...]) -> Recipe:
    """Put new query and key rows behind the old ones of each head; lossless queries start at zero."""
    size, drawn = config.head_size, first_value(QKV, shape, config=config)
    new_query = Constant(0.0) if expansion.init == "lossless" else drawn
    blocks: list[Block] = []
    for head in range(config.num_attention_heads):
        start, rows = 3 * head * size, size * (expansion.factor - 1)
        blocks += [Keep(start, start + size), Fresh(rows, new_query)]
        blocks += [Keep(start + size, start + 2 * size), Fresh(rows, drawn)]
        blocks.append(Keep(start + 2 * size, start + 3 * size))
    return from_blocks(shape, blocks)
