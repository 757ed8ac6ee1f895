"""The RetNet layer: GLA with a fixed decay per head in place of gates, and rotary positions on queries and keys.

A merged or grown head consists of blocks of the original ``head_key_dim`` channels; each keeps the decay of the head
that it came from and rotates by itself. The position of the next token is part of the layer's state.
"""

from __future__ import annotations

import torch

from statex_dist.models.fla_block import FLABlock
from statex_dist.models.gla.mixer import GatedLinearAttention
from statex_dist.models.retnet.config import RetNetConfig
from statex_dist.models.sequence import LayerState, Sequences
from statex_dist.ops.cu_seqlens import borders_of
from statex_dist.ops.precision import wide_dtype

ROTARY_BASE = 10000.0


class Retention(GatedLinearAttention):
    """Token mixing of one layer (arXiv 2307.08621, section 2)."""

    config: RetNetConfig

    def add_gates(self, keys: int) -> None:
        """Add nothing: decays are fixed. Head ``h`` of the original keeps ``1 - 2^(-5 - h)`` per token."""
        self.blocks_per_head = keys // self.config.num_heads // self.config.head_key_dim

    def queries_keys_decays(
        self, q: torch.Tensor, k: torch.Tensor, x: torch.Tensor, sequences: Sequences, state: LayerState | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
        """Return rotated queries and keys, log decays ``[B, T, keys]``, and the position after the last token."""
        positions, after = _positions(x, sequences, state[1] if state else None)
        q, k = (_rotate(y.unflatten(-1, (-1, self.config.head_key_dim)), positions).flatten(-2) for y in (q, k))
        wide = wide_dtype(x.dtype)
        heads = torch.arange(self.config.num_heads, dtype=wide, device=x.device)
        decay = torch.log1p(-torch.exp2(-5 - heads))
        decay = decay.repeat_interleave(self.blocks_per_head * self.config.head_key_dim)
        return q, k, decay[self.heads.key_channels].expand(*x.shape[:2], -1), (after,)


def _positions(x: torch.Tensor, sequences: Sequences, before: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each token's position ``[B, T]`` and, per sequence, that of the token after its last ``[S]``."""
    if sequences.cu_seqlens is None:
        lengths = [(0, x.shape[1])] * x.shape[0]
    else:
        lengths = borders_of(sequences.cu_seqlens)
    counts = torch.tensor([stop - start for start, stop in lengths], device=x.device)
    starts = torch.zeros_like(counts) if before is None else before
    after = starts + counts
    if sequences.context is not None:
        # A position is carried on as a state is: it grows by the share's tokens, undecayed.
        last = counts[-1:].double()
        first, after = (y.to(counts.dtype) for y in sequences.context.exchange(last, torch.ones_like(last), before))
        starts = torch.cat([first, starts.new_zeros(len(counts) - 1)])
    rows = [
        torch.arange(stop - start, device=x.device) + first
        for (start, stop), first in zip(lengths, starts, strict=True)
    ]
    packed = sequences.cu_seqlens is not None
    return (torch.cat(rows).unsqueeze(0) if packed else torch.stack(rows)), after


def _rotate(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rotate the halves of ``x [B, T, H, D]`` by the tokens' positions (arXiv 2104.09864, in the half-split form)."""
    half = x.shape[-1] // 2
    wide = wide_dtype(x.dtype)
    frequency = ROTARY_BASE ** -(torch.arange(half, dtype=wide, device=x.device) / half)
    angle = positions.to(wide)[..., None, None] * frequency
    first, second = x.to(wide).split(half, dim=-1)
    rotated = (first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin())
    return torch.cat(rotated, dim=-1).to(x.dtype)


class Block(FLABlock):
    """One pre-norm RetNet layer."""

    mixing = Retention
