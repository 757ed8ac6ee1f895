"""Expansion of an HGRN2 layer, as recipes (:mod:`statex_dist.models.fla_expand`).

The output norm runs over all heads together, so merging heads changes no tensor at all.
"""

from __future__ import annotations

from functools import partial

from statex_dist.models.fla_expand import mix_recipe, redrawn_tensors, renewed_norms
from statex_dist.models.hgrn2.config import HGRN2Config
from statex_dist.models.hgrn2.init import first_value
from statex_dist.models.hgrn2.layout import layer_tensors
from statex_dist.models.recipe import Recipe
from statex_dist.state.plan import LayerExpansion


def layer_recipes(config: HGRN2Config, after: HGRN2Config, expansion: LayerExpansion) -> dict[str, Recipe]:
    """Return a recipe for each tensor of an expanded layer that changes or is new, by name without the prefix.

    Args:
        config: Configuration of the original model.
        after: Configuration of the expanded model.
        expansion: What is done to the layer.
    """
    before, target = layer_tensors(config, expansion.layer), layer_tensors(after, expansion.layer)
    recipes = mix_recipe(expansion, config.heads)
    if expansion.init == "reinit":
        names = [name for name in before if name.startswith("attn.") and "norm" not in name]
        recipes |= redrawn_tensors(before, target, names, partial(first_value, config=config))
    norms = renewed_norms(expansion, before, target, norm="attn_norm.weight", output_norm="attn.g_norm.weight")
    return recipes | norms
