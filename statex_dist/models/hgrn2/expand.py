"""Expansion of an HGRN2 layer, as recipes (:mod:`statex_dist.models.fla_expand`).

The output norm runs over all heads together, so merging heads changes no tensor at all.
"""

from __future__ import annotations

from functools import partial

from statex_dist.models.distributions import Constant
from statex_dist.models.fla_expand import mix_recipe, redrawn_tensors
from statex_dist.models.hgrn2.config import HGRN2Config
from statex_dist.models.hgrn2.init import first_value
from statex_dist.models.hgrn2.layout import layer_tensors
from statex_dist.models.recipe import Recipe, redrawn
from statex_dist.state.plan import LayerExpansion


def layer_recipes(config: HGRN2Config, after: HGRN2Config, expansion: LayerExpansion) -> dict[str, Recipe]:
    """Return a recipe for each tensor of an expanded layer that changes or is new, by name without the prefix.

    Args:
        config: Configuration of the original model.
        after: Configuration of the expanded model.
        expansion: What is done to the layer.
    """
    before = layer_tensors(config, expansion.layer)
    recipes = mix_recipe(expansion, config.heads)
    if expansion.init == "reinit":
        names = [name for name in before if name.startswith("attn.") and "norm" not in name]
        recipes |= redrawn_tensors(
            before, layer_tensors(after, expansion.layer), names, partial(first_value, config=config)
        )
    if expansion.reset_dynamics:
        names = ["attn_norm.weight"] + ["attn.g_norm.weight"] * (expansion.init == "reinit")
        for name in names:
            recipes[name] = redrawn(before[name].shape, Constant(1.0), source_rows=before[name].shape[0])
    return recipes
