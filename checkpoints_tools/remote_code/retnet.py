"""RetNet (arXiv 2307.08621): linear attention with a fixed decay per head and rotary positions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .cache import LayerState, Tokens
from .configuration import PlannedConfig
from .fla_block import FLABlock, FLAConfig, add_convolutions, short_convolutions
from .gated_norm import GatedRMSNorm
from .layers import wide
from .linear_attention import linear_attention
from .mixing import add_mix
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


class Retention(nn.Module):
    """Token mixing of one layer.

    A merged or grown head consists of blocks of the original's key channels: each keeps its decay, and rotates alone.
    """

    mix: nn.Parameter | None

    def __init__(self, config: Any, layer: int):
        super().__init__()
        self.config = config
        self.num_heads, num_partners = config.heads_and_partners(layer, config.num_heads)
        self.block_channels, self.blocks_per_head = config.key_dim // config.num_heads, config.key_growth(layer)
        hidden, keys, values = config.hidden_size, config.key_dim * self.blocks_per_head, config.value_dim
        self.q_proj = nn.Linear(hidden, keys, bias=False)
        self.k_proj = nn.Linear(hidden, keys, bias=False)
        self.v_proj = nn.Linear(hidden, values, bias=False)
        self.g_proj = nn.Linear(hidden, values, bias=False)
        self.o_proj = nn.Linear(values, hidden, bias=False)
        self.norm_name = "g_norm_swish_gate" if config.fuse_norm else "g_norm"
        self.add_module(self.norm_name, GatedRMSNorm(values // self.num_heads, config.norm_eps))
        if config.use_short_conv:
            add_convolutions(self, {"q": keys, "k": keys, "v": values}, config.conv_size)
        add_mix(self, self.num_heads, num_partners)
        # Merged heads are scaled by the channels that they have, mixed and grown ones by those that they had.
        self.scale = (config.key_dim // self.num_heads) ** -0.5

    def forward(self, x: torch.Tensor, tokens: Tokens, state: LayerState | None) -> tuple[torch.Tensor, LayerState]:
        """Return ``[B, T, hidden]`` and the state after the tokens ``x [B, T, hidden]``."""
        recurrent, *tail = state or (None,)
        inputs = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        (q, k, v), tail_after = short_convolutions(self, "qkv", inputs, tokens, *(tail or (None,)))
        if self.config.use_short_conv:
            q, k, v = F.silu(q), F.silu(k), F.silu(v)
        q, k = (rotate(y.unflatten(-1, (-1, self.block_channels)), tokens.positions).flatten(-2) for y in (q, k))
        heads = torch.arange(self.config.num_heads, dtype=wide(x).dtype, device=x.device)
        g = torch.log1p(-torch.exp2(-5 - heads)).repeat_interleave(self.blocks_per_head * self.block_channels)
        q, k, v, gate = (y.unflatten(-1, (self.num_heads, -1)) for y in (q, k, v, self.g_proj(x)))
        g = g.view(self.num_heads, -1).expand_as(k)
        o, recurrent = linear_attention(q, k, v, g, recurrent, scale=self.scale, mix=self.mix)
        o = self.get_submodule(self.norm_name)(o, gate)
        return self.o_proj(o.flatten(-2)), (recurrent, *tail_after)


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
