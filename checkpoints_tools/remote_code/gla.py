"""Gated linear attention (arXiv 2312.06635)."""

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
    """Configuration of a GLA model."""

    model_type = "gla"
    __init__ = PlannedConfig.__init__  # transformers 5 makes one of its own for a class without

    @property
    def key_dim(self) -> int:
        """Key channels of all heads together, before the plan."""
        return int(self.hidden_size * self.expand_k)

    @property
    def value_dim(self) -> int:
        """Value channels of all heads together."""
        return int(self.hidden_size * self.expand_v)


class GatedLinearAttention(nn.Module):
    """Token mixing of one layer."""

    mix: nn.Parameter | None

    def __init__(self, config: Any, layer: int):
        super().__init__()
        self.config = config
        self.num_heads, num_partners = config.heads_and_partners(layer, config.num_heads)
        hidden, keys, values = config.hidden_size, config.key_dim * config.key_growth(layer), config.value_dim
        self.q_proj = nn.Linear(hidden, keys, bias=False)
        self.k_proj = nn.Linear(hidden, keys, bias=False)
        self.v_proj = nn.Linear(hidden, values, bias=False)
        self.g_proj = nn.Linear(hidden, values, bias=False)
        self.gk_proj = nn.Sequential(nn.Linear(hidden, 16, bias=False), nn.Linear(16, keys))
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
        g = F.logsigmoid(wide(self.gk_proj(x))) / self.config.gate_logit_normalizer
        if self.config.clamp_min is not None:
            g = g.clamp(min=self.config.clamp_min)
        q, k, v, g, gate = (y.unflatten(-1, (self.num_heads, -1)) for y in (q, k, v, g, self.g_proj(x)))
        o, recurrent = linear_attention(q, k, v, g, recurrent, scale=self.scale, mix=self.mix)
        o = self.get_submodule(self.norm_name)(o, gate)
        return self.o_proj(o.flatten(-2)), (recurrent, *tail_after)


class Block(FLABlock):
    """One GLA layer."""

    mixing = GatedLinearAttention


class StateXModel(Trunk):
    """GLA without its head."""

    config_class = StateXConfig
    base_model_prefix = "model"
    block = Block
