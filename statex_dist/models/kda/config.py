"""Configuration of a KDA model (the keys of flash-linear-attention's ``KDAConfig``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from statex_dist.errors import CheckpointError
from statex_dist.models.delta_rule import DeltaRuleConfig


@dataclass(kw_only=True)
class KDAConfig(DeltaRuleConfig):
    """Hyper-parameters of a KDA language model; ``lower_bound`` bounds the log decays (with ``safe_gate``)."""

    MODEL_TYPE: ClassVar[str] = "kda"

    num_heads: int = 16
    head_dim: int = 128
    expand_v: float = 1.0
    safe_gate: bool = False
    lower_bound: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.safe_gate and self.lower_bound is None:
            raise CheckpointError("kda config: safe_gate needs a lower_bound")

    @property
    def gate_dim(self) -> int:
        """Decays of all value heads together: one per key channel."""
        return self.value_heads * self.head_dim
