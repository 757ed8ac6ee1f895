"""Expansion of the layer: Mamba2's."""

from statex_dist.models.mamba2.expand import layer_recipes

__all__ = ["layer_recipes"]
