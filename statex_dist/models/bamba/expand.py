"""Expansion of a Bamba model's Mamba2 layer, as recipes: Mamba2's under Bamba's names."""

from __future__ import annotations

from statex_dist.models.bamba.config import BambaConfig
from statex_dist.models.bamba.layout import renamed
from statex_dist.models.mamba2 import expand as mamba2_expand
from statex_dist.models.recipe import Recipe
from statex_dist.state.plan import LayerExpansion


def layer_recipes(config: BambaConfig, after: BambaConfig, expansion: LayerExpansion) -> dict[str, Recipe]:
    """Return a recipe for each tensor of an expanded layer that changes, by name without the prefix."""
    recipes = mamba2_expand.layer_recipes(config.mamba2(), after.mamba2(), expansion)
    return {name: recipe for suffix, recipe in recipes.items() if (name := renamed(suffix))}
