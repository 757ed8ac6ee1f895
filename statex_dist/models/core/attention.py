"""Layers with softmax attention beside recurrent ones: rotary positions, and flash-linear-attention's layer.

Positions are those in the document: of packed sequences each by itself, and after the tokens that a state has read. A
state is keys and values (:class:`statex_dist.ops.attention.KeyValues`), which grow with the text.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from statex_dist.models.attention_layers import AttentionSizes
from statex_dist.models.core.layers import FLABlock
from statex_dist.models.core.mixer import token_positions
from statex_dist.models.core.sequences import LayerState, Sequences
from statex_dist.ops.attention import KeyValues, attention


def positions_after(x: torch.Tensor, sequences: Sequences, read: torch.Tensor | None) -> torch.Tensor:
    """Return each token's place in its sequence, ``[B, T]``.

    Args:
        x: ``[B, T, ...]``.
        sequences: How the tokens form sequences.
        read: Tokens read before: ``[B]`` of each row, or ``[1]`` of the first sequence of a pack; None for none.
    """
    if read is not None and sequences.cu_seqlens is not None and sequences.context is None:
        read = torch.cat([read[:1], read.new_zeros(len(sequences.cu_seqlens) - 2)])
    positions, _ = token_positions(x, sequences, read)
    return positions


def rotate(x: torch.Tensor, positions: torch.Tensor, sizes: AttentionSizes) -> torch.Tensor:
    """Rotate the first channels of each head by the tokens' positions (arXiv 2104.09864).

    Angles are computed in fp32, and their sines rounded to ``x``'s dtype, as in flash-attention's embeddings.

    Args:
        x: ``[B, T, H, D]``.
        positions: ``[B, T]``.
        sizes: Says how many channels, by which frequencies, and in which pairs.
    """
    if not (size := sizes.rotary_dim):
        return x
    wide = torch.promote_types(x.dtype, torch.float32)
    frequency = sizes.rotary_base ** -(torch.arange(0, size, 2, dtype=wide, device=x.device) / size)
    angle = positions.to(wide)[..., None, None] * frequency
    cos, sin = (y.to(x.dtype).to(wide) for y in (angle.cos(), angle.sin()))
    turned, rest = x[..., :size].to(wide), x[..., size:]
    first, second = turned.unflatten(-1, (-1, 2)).unbind(-1) if sizes.interleaved else turned.chunk(2, dim=-1)
    pair = (first * cos - second * sin, second * cos + first * sin)
    turned = torch.stack(pair, dim=-1).flatten(-2) if sizes.interleaved else torch.cat(pair, dim=-1)
    return torch.cat([turned.to(x.dtype), rest], dim=-1)


class AttentionMixer(nn.Module):
    """Softmax attention of one layer, around the projections that a library gives it.

    Args:
        sizes: Its sizes and options.

    Attributes:
        num_heads: Heads of queries in this process.
        num_kv_heads: Heads of keys and values in this process.
    """

    def __init__(self, sizes: AttentionSizes):
        super().__init__()
        self.sizes = sizes
        self.hold(1, 0)

    def hold(self, tp: int, rank: int) -> None:
        """Take the heads of one of ``tp`` ranks, which must be able to share the layer."""
        counts = []
        for units in self.sizes.units[:2]:
            held = units.held(units.count, tp, rank)
            assert held is not None, (self.sizes, tp)
            counts.append(held[1] - held[0])
        self.num_heads, self.num_kv_heads = counts

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequences: Sequences, before: KeyValues | None
    ) -> tuple[torch.Tensor, KeyValues | None]:
        """Return the outputs ``[B, T, H D]`` and the keys and values so far; arguments are ``[B, T, heads D]``."""
        q, k, v = (y.unflatten(-1, (-1, self.sizes.head_dim)) for y in (q, k, v))
        positions = positions_after(q, sequences, None if before is None else before.lengths)
        q, k = (rotate(y, positions, self.sizes) for y in (q, k))
        o, after = attention(
            *(y.transpose(1, 2) for y in (q, k, v)),
            scale=self.sizes.scale,
            window=self.sizes.window,
            cu_seqlens=sequences.cu_seqlens,
            before=before,
            context=sequences.context,
            output_final_state=sequences.output_states,
        )
        return o.transpose(1, 2).flatten(-2), after


class FLAAttention(AttentionMixer):
    """flash-linear-attention's ``Attention`` (its ``layers/attn.py``)."""

    def __init__(self, config: Any, layer: int):
        sizes = config.attention_layer(layer).sizes
        super().__init__(sizes)
        self.q_proj = nn.Linear(config.hidden_size, sizes.query_size, bias=sizes.bias)
        self.k_proj = nn.Linear(config.hidden_size, sizes.key_size, bias=sizes.bias)
        self.v_proj = nn.Linear(config.hidden_size, sizes.key_size, bias=sizes.bias)
        self.o_proj = nn.Linear(sizes.query_size, config.hidden_size, bias=False)

    def forward(
        self, x: torch.Tensor, sequences: Sequences, state: LayerState | None = None, *shared: torch.Tensor | None
    ) -> tuple[torch.Tensor, KeyValues | None]:
        """Mix tokens; arguments are those of a recurrent mixer, and what recurrent layers share is not used."""
        before = None if state is None else KeyValues(*state)
        o, after = self.attend(self.q_proj(x), self.k_proj(x), self.v_proj(x), sequences, before)
        return self.o_proj(o), after


class FLAAttentionBlock(FLABlock):
    """One pre-norm attention layer of flash-linear-attention's models."""

    mixing = FLAAttention
