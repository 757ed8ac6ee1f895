"""Names and shapes of a Mamba2 model's tensors in the original layout: the embedding table has another name."""

from __future__ import annotations

from statex_dist.models.layout import Names
from statex_dist.models.mamba2.layout import layer_tensors

__all__ = ["NAMES", "layer_tensors"]

NAMES = Names(trunk="backbone", final_norm="norm_f", embedding="embedding")
