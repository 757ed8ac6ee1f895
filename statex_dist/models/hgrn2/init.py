"""First values of the layer's tensors: flash-linear-attention's common rules."""

from statex_dist.models.fla_init import first_value

__all__ = ["first_value"]
