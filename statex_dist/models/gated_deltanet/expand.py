"""Expansion of a Gated DeltaNet layer, as recipes: value heads are mixed.

:mod:`statex_dist.models.delta_rule` says why that and nothing else.
"""

from __future__ import annotations

from functools import partial

from statex_dist.models.delta_rule import mixing_recipes
from statex_dist.models.gated_deltanet.config import GatedDeltaNetConfig
from statex_dist.models.gated_deltanet.init import first_value
from statex_dist.models.gated_deltanet.layout import layer_tensors
from statex_dist.models.recipe import Recipe
from statex_dist.state.plan import LayerExpansion


def layer_recipes(
    config: GatedDeltaNetConfig, after: GatedDeltaNetConfig, expansion: LayerExpansion
) -> dict[str, Recipe]:
    """Return a recipe for each tensor of an expanded layer that changes or is new, by name without the prefix."""
    return mixing_recipes(
        config,
        expansion,
        layer_tensors(config, expansion.layer),
        layer_tensors(after, expansion.layer),
        partial(first_value, config=config),
    )
