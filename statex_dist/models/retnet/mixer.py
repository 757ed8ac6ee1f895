"""The RetNet layer: GLA with a fixed decay per head in place of gates, and rotary positions on queries and keys.

A merged or grown head consists of blocks of the original ``head_key_dim`` channels; each keeps the decay of the head
that it came from and rotates by itself.
"""

from __future__ import annotations

import torch

from statex_dist.models.core.layers import FLABlock
from statex_dist.models.core.mixer import Tokens
from statex_dist.models.gla.mixer import GatedLinearAttention
from statex_dist.models.retnet.config import RetNetConfig
from statex_dist.ops.mitigations import Tensors

ROTARY_BASE = 10000.0


class Retention(GatedLinearAttention):
    """Token mixing of one layer (arXiv 2307.08621, section 2)."""

    HAS_POSITIONS = True
    config: RetNetConfig

    def add_gates(self, keys: int) -> None:
        """Add nothing: decays are fixed. Head ``h`` of the original keeps ``1 - 2^(-5 - h)`` per token."""
        self.blocks_per_head = keys // self.config.num_heads // self.config.head_key_dim

    def queries_keys_decays(self, tokens: Tokens) -> Tensors:
        """Return rotated queries and keys, and log decays ``[B, T, keys]``."""
        x, (q, k, _) = tokens.x, tokens.convolved
        assert tokens.positions is not None
        q, k = (rotate(y.unflatten(-1, (-1, self.config.head_key_dim)), tokens.positions).flatten(-2) for y in (q, k))
        heads = torch.arange(self.config.num_heads, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        decay = torch.log1p(-torch.exp2(-5 - heads))
        decay = decay.repeat_interleave(self.blocks_per_head * self.config.head_key_dim)
        return q, k, decay[self.heads.key_channels].expand(*x.shape[:2], -1)


def rotate(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rotate the halves of ``x [B, T, H, D]`` by the tokens' positions (arXiv 2104.09864, in the half-split form)."""
    half = x.shape[-1] // 2
    wide = torch.promote_types(x.dtype, torch.float32)
    frequency = ROTARY_BASE ** -(torch.arange(half, dtype=wide, device=x.device) / half)
    angle = positions.to(wide)[..., None, None] * frequency
    first, second = x.to(wide).split(half, dim=-1)
    rotated = (first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin())
    return torch.cat(rotated, dim=-1).to(x.dtype)


class RetNetBlock(FLABlock):
    """One pre-norm RetNet layer."""

    mixing = Retention
