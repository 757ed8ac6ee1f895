"""The layer: Mamba2's."""

from statex_dist.models.mamba2.mixer import Block

__all__ = ["Block"]
