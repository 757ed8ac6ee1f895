"""Configuration of a Gated DeltaNet model (the keys of flash-linear-attention's ``GatedDeltaNetConfig``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from statex_dist.models.delta_rule import DeltaRuleConfig


@dataclass(kw_only=True)
class GatedDeltaNetConfig(DeltaRuleConfig):
    """Hyper-parameters of a Gated DeltaNet language model."""

    MODEL_TYPE: ClassVar[str] = "gated_deltanet"

    num_heads: int = 6
    head_dim: int = 256
    expand_v: float = 2.0
    use_gate: bool = True
    output_gate_activation: str = "swish"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_allowed("output_gate_activation", "swish", "silu", "sigmoid")
