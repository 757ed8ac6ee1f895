"""First values of the layer's tensors: Mamba2's."""

from statex_dist.models.mamba2.init import first_value

__all__ = ["first_value"]
