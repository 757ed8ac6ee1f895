"""Names and shapes of a RetNet model's tensors, as flash-linear-attention writes them: GLA's without the gate."""

from __future__ import annotations

from statex_dist.models.fla import NAMES
from statex_dist.models.gla import layout as gla_layout
from statex_dist.models.gla.layout import gate_norm_name
from statex_dist.models.layout import TensorSpec
from statex_dist.models.retnet.config import RetNetConfig

__all__ = ["NAMES", "gate_norm_name", "layer_tensors"]


def layer_tensors(config: RetNetConfig, layer: int) -> dict[str, TensorSpec]:
    """Return the tensors of one layer under the plan, by name without the layer's prefix."""
    specs = gla_layout.layer_tensors(config, layer)
    return {name: spec for name, spec in specs.items() if ".gk_proj." not in name}
