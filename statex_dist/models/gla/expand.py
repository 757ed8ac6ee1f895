"""Expansion of a GLA layer, as recipes: what becomes of each tensor (:mod:`statex_dist.models.fla_expand`).

Beside merging and mixing heads, *grow_state* gives every head more key channels. ``lossless`` makes the new query rows
zero and leaves keys and gates of the new channels random: they are written but not read until the queries have
learned. The scale of the queries stays that of the original channels.
"""

from __future__ import annotations

from functools import partial

from statex_dist.models.distributions import Constant
from statex_dist.models.fla_expand import mix_recipe, redrawn_tensors, renewed_norms
from statex_dist.models.gla.config import GLAConfig
from statex_dist.models.gla.init import first_value
from statex_dist.models.gla.layout import gate_norm_name, layer_tensors
from statex_dist.models.recipe import Recipe, from_blocks, grown_groups, repeated
from statex_dist.state.plan import LayerExpansion

TOKEN_MIXING = ("q_proj", "k_proj", "v_proj", "g_proj", "o_proj", "gk_proj", "q_conv1d", "k_conv1d", "v_conv1d")
KEY_SIDE = (
    "q_proj.weight",
    "k_proj.weight",
    "gk_proj.1.weight",
    "gk_proj.1.bias",
    "q_conv1d.weight",
    "k_conv1d.weight",
)


def layer_recipes(config: GLAConfig, after: GLAConfig, expansion: LayerExpansion) -> dict[str, Recipe]:
    """Return a recipe for each tensor of an expanded layer that changes or is new, by name without the prefix.

    Args:
        config: Configuration of the original model.
        after: Configuration of the expanded model.
        expansion: What is done to the layer.
    """
    before, target = layer_tensors(config, expansion.layer), layer_tensors(after, expansion.layer)
    first = partial(first_value, config=config, layer_default=expansion.reset_dynamics)
    recipes = mix_recipe(expansion, config.num_heads)
    norm = gate_norm_name(config)
    if expansion.op == "merge_heads":
        recipes[norm] = repeated(before[norm].shape, expansion.factor)
    if expansion.init == "reinit":
        names = [name for name in before if name.startswith("attn.") and name.split(".")[1] in TOKEN_MIXING]
        recipes |= redrawn_tensors(before, target, names, first)
    elif expansion.op == "grow_state":
        recipes |= _grown(config, expansion)
    return recipes | renewed_norms(expansion, before, target, norm="attn_norm.weight", output_norm=norm)


def _grown(config: GLAConfig, expansion: LayerExpansion) -> dict[str, Recipe]:
    """Return recipes that put new key channels behind the old ones of each head."""
    recipes = {}
    for name, spec in layer_tensors(config, expansion.layer).items():
        if name.removeprefix("attn.") not in KEY_SIDE:
            continue
        new = first_value(name, spec.shape, config=config)
        if expansion.init == "lossless" and name == "attn.q_proj.weight":
            new = Constant(0.0)
        rows = config.key_dim // config.num_heads
        blocks = grown_groups(0, groups=config.num_heads, rows=rows, factor=expansion.factor, new=new)
        recipes[name] = from_blocks(spec.shape, blocks)
    return recipes
