"""A RetNet model: configuration (keys of flash-linear-attention's ``RetNetConfig``), GLA's tensors without gates.

Merged or grown, every block of ``head_key_dim`` key channels keeps its own decay and its own rotary positions, which
belong to the mixer and not to any tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from statex_dist.errors import CheckpointError
from statex_dist.models import fla
from statex_dist.models.gla import config as gla
from statex_dist.models.gla.config import GLAConfig
from statex_dist.models.layout import TensorSpec
from statex_dist.models.registry import Family
from statex_dist.models.row_mapping import RowMapping
from statex_dist.state.plan import LayerExpansion


@dataclass(kw_only=True)
class RetNetConfig(GLAConfig):
    """Hyper-parameters of a RetNet language model: those of GLA, without gates and with rotary positions."""

    MODEL_TYPE: ClassVar[str] = "retnet"

    num_heads: int = 8
    expand_k: float = 1.0
    expand_v: float = 2.0
    hidden_ratio: int | None = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_ignored("RetNetForCausalLM", "use_short_conv", False)
        if self.head_key_dim % 2:
            raise CheckpointError(f"retnet config: rotary positions need an even key size, not {self.head_key_dim}")

    @property
    def ours_alone(self) -> bool:
        """Also with convolutions: flash-linear-attention's layer has them, its model does not hand the key on."""
        return super().ours_alone or self.use_short_conv

    @property
    def head_key_dim(self) -> int:
        """Key channels of a head before any expansion: the span of the rotary positions."""
        return self.key_dim // self.num_heads


def layer_tensors(config: RetNetConfig, layer: int) -> dict[str, TensorSpec]:
    """Return the tensors of one layer under the plan, by name without the layer's prefix."""
    specs = gla.layer_tensors(config, layer)
    return {name: spec for name, spec in specs.items() if ".gk_proj." not in name}


def layer_mappings(config: RetNetConfig, after: RetNetConfig, expansion: LayerExpansion) -> dict[str, RowMapping]:
    """Return a row mapping for each tensor of an expanded layer that changes or is new, by name without the prefix."""
    mappings = gla.layer_mappings(config, after, expansion)
    return {name: mapping for name, mapping in mappings.items() if ".gk_proj." not in name}


FAMILY = Family(
    config=RetNetConfig,
    names=fla.NAMES,
    layer_tensors=layer_tensors,
    first_value=fla.first_value,
    layer_mappings=layer_mappings,
    block="statex_dist.models.retnet.mixer:RetNetBlock",
)
