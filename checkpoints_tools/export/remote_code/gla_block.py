"""Token mixing that GLA and RetNet share: linear attention with an output gate."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .cache import LayerState, Tokens
from .fla_block import add_convolutions, short_convolutions
from .gated_norm import GatedRMSNorm
from .linear_attention import linear_attention
from .mixing import add_mix


class GatedMixing(nn.Module):
    """Token mixing of one layer; a family says where the decays come from."""

    mix: nn.Parameter | None

    def __init__(self, config: Any, layer: int):
        super().__init__()
        self.config = config
        self.num_heads, num_partners = config.heads_and_partners(layer, config.num_heads)
        self.key_growth = config.key_growth(layer)
        hidden, keys, values = config.hidden_size, config.key_dim * self.key_growth, config.value_dim
        self.q_proj = nn.Linear(hidden, keys, bias=False)
        self.k_proj = nn.Linear(hidden, keys, bias=False)
        self.v_proj = nn.Linear(hidden, values, bias=False)
        self.g_proj = nn.Linear(hidden, values, bias=False)
        self.add_gates(keys)
        self.o_proj = nn.Linear(values, hidden, bias=False)
        self.norm_name = "g_norm_swish_gate" if config.fuse_norm else "g_norm"
        self.add_module(self.norm_name, GatedRMSNorm(values // self.num_heads, config.norm_eps))
        if config.use_short_conv:
            add_convolutions(self, {"q": keys, "k": keys, "v": values}, config.conv_size)
        add_mix(self, self.num_heads, num_partners)
        # Merged heads are scaled by the channels that they have, mixed and grown ones by those that they had.
        self.scale = (config.key_dim // self.num_heads) ** -0.5

    def add_gates(self, keys: int) -> None:
        """Add what the log decays of so many key channels are computed from: nothing."""

    def queries_keys_decays(
        self, q: torch.Tensor, k: torch.Tensor, x: torch.Tensor, tokens: Tokens
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return queries, keys and log decays ``[B, T, keys]``."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor, tokens: Tokens, state: LayerState | None) -> tuple[torch.Tensor, LayerState]:
        """Return ``[B, T, hidden]`` and the state after the tokens ``x [B, T, hidden]``."""
        recurrent, *tail = state or (None,)
        inputs = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        (q, k, v), tail_after = short_convolutions(self, "qkv", inputs, tokens, *(tail or (None,)))
        if self.config.use_short_conv:
            q, k, v = F.silu(q), F.silu(k), F.silu(v)
        q, k, g = self.queries_keys_decays(q, k, x, tokens)
        q, k, v, g, gate = (y.unflatten(-1, (self.num_heads, -1)) for y in (q, k, v, g, self.g_proj(x)))
        o, recurrent = linear_attention(q, k, v, g, recurrent, scale=self.scale, mix=self.mix)
        o = self.get_submodule(self.norm_name)(o, gate)
        return self.o_proj(o.flatten(-2)), (recurrent, *tail_after)
