"""RetNet (arXiv 2307.08621): linear attention with a fixed decay per head and rotary positions."""

from __future__ import annotations

import torch

from .cache import Tokens
from .configuration import PlannedConfig
from .fla_block import FLABlock, FLAConfig
from .gla_block import GatedMixing
from .layers import wide
from .trunk import Trunk


class StateXConfig(FLAConfig):
    """Configuration of a RetNet model."""

    model_type = "retnet"
    __init__ = PlannedConfig.__init__  # transformers 5 makes one of its own for a class without

    @property
    def key_dim(self) -> int:
        """Key channels of all heads together, before the plan."""
        return round(self.hidden_size * self.expand_k)

    @property
    def value_dim(self) -> int:
        """Value channels of all heads together."""
        return round(self.hidden_size * self.expand_v)


class Retention(GatedMixing):
    """Token mixing of one layer.

    A merged or grown head consists of blocks of the original's key channels: each keeps its decay, and rotates alone.
    """

    def queries_keys_decays(
        self, q: torch.Tensor, k: torch.Tensor, x: torch.Tensor, tokens: Tokens
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return rotated queries and keys and log decays ``[B, T, keys]``."""
        channels = self.config.key_dim // self.config.num_heads
        q, k = (rotate(y.unflatten(-1, (-1, channels)), tokens.positions).flatten(-2) for y in (q, k))
        heads = torch.arange(self.config.num_heads, dtype=wide(x).dtype, device=x.device)
        g = torch.log1p(-torch.exp2(-5 - heads)).repeat_interleave(self.key_growth * channels)
        return q, k, g.expand_as(k)


def rotate(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rotate the halves of ``x [B, T, H, D]`` by the tokens' ``positions [B, T]`` (arXiv 2104.09864)."""
    first, second = wide(x).chunk(2, dim=-1)
    frequency = 10000.0 ** -(torch.arange(first.shape[-1], dtype=first.dtype, device=x.device) / first.shape[-1])
    angle = positions.to(first.dtype)[..., None, None] * frequency
    rotated = (first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin())
    return torch.cat(rotated, dim=-1).to(x.dtype)


class Block(FLABlock):
    """One RetNet layer."""

    mixing = Retention


class StateXModel(Trunk):
    """RetNet without its head."""

    config_class = StateXConfig
    base_model_prefix = "model"
    block = Block
