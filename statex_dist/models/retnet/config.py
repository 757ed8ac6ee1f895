"""Configuration of a RetNet model (the keys of flash-linear-attention's ``RetNetConfig``) and its geometry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from statex_dist.errors import CheckpointError
from statex_dist.models.gla.config import GLAConfig


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
