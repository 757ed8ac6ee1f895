"""Expansion of a RetNet layer, as recipes: GLA's, for the tensors that RetNet has.

Merged or grown, every block of ``head_key_dim`` key channels keeps its own decay and its own rotary positions, which
belong to the mixer and not to any tensor.
"""

from __future__ import annotations

from statex_dist.models.gla import expand as gla_expand
from statex_dist.models.recipe import Recipe
from statex_dist.models.retnet.config import RetNetConfig
from statex_dist.state.plan import LayerExpansion


def layer_recipes(config: RetNetConfig, after: RetNetConfig, expansion: LayerExpansion) -> dict[str, Recipe]:
    """Return a recipe for each tensor of an expanded layer that changes or is new, by name without the prefix."""
    recipes = gla_expand.layer_recipes(config, after, expansion)
    return {name: recipe for name, recipe in recipes.items() if ".gk_proj." not in name}
