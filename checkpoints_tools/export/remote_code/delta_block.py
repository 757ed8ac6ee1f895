"""Token mixing that Gated DeltaNet and Kimi Delta Attention share."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .cache import LayerState, Tokens
from .delta_rule import delta_rule
from .fla_block import FLAConfig, add_convolutions, short_convolutions
from .layers import wide
from .mixing import add_mix


class DeltaConfig(FLAConfig):
    """Sizes that the configurations of both have in common."""

    @property
    def value_heads(self) -> int:
        """Value heads, each with a recurrence of its own."""
        return self.num_v_heads or self.num_heads

    @property
    def head_value_dim(self) -> int:
        """Value channels of a value head."""
        return round(self.head_dim * self.expand_v)


class DeltaAttention(nn.Module):
    """Token mixing of one layer; a family adds decays and output gate."""

    mix: nn.Parameter | None

    def __init__(self, config: Any, layer: int):
        super().__init__()
        self.config = config
        hidden, keys = config.hidden_size, config.num_heads * config.head_dim
        values = config.value_heads * config.head_value_dim
        self.q_proj = nn.Linear(hidden, keys, bias=False)
        self.k_proj = nn.Linear(hidden, keys, bias=False)
        self.v_proj = nn.Linear(hidden, values, bias=False)
        self.b_proj = nn.Linear(hidden, config.value_heads, bias=False)
        self.A_log = nn.Parameter(torch.zeros(config.value_heads))
        if config.use_short_conv:
            add_convolutions(self, {"q": keys, "k": keys, "v": values}, config.conv_size)
        self.o_proj = nn.Linear(values, hidden, bias=False)
        add_mix(self, *config.heads_and_partners(layer, config.value_heads))

    def log_decays(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``[B, T, HV, 1]`` or ``[B, T, HV, K]`` log decays, at most 0."""
        raise NotImplementedError

    def gated(self, o: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return the normed and gated outputs ``[B, T, HV, V]``."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor, tokens: Tokens, state: LayerState | None) -> tuple[torch.Tensor, LayerState]:
        """Return ``[B, T, hidden]`` and the state after the tokens ``x [B, T, hidden]``."""
        recurrent, *tail = state or (None,)
        inputs = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        outputs, tail_after = short_convolutions(self, "qkv", inputs, tokens, *(tail or (None,)))
        q, k, v = (F.silu(y) for y in outputs)
        q, k = (unit_length(y.unflatten(-1, (self.config.num_heads, -1))) for y in (q, k))
        v = v.unflatten(-1, (self.config.value_heads, -1))
        beta = torch.sigmoid(wide(self.b_proj(x))) * (2 if self.config.allow_neg_eigval else 1)
        o, recurrent = delta_rule(q, k, v, self.log_decays(x), beta, recurrent, mix=self.mix)
        return self.o_proj(self.gated(o, x).flatten(-2)), (recurrent, *tail_after)


def unit_length(x: torch.Tensor) -> torch.Tensor:
    """Return ``x`` over its Euclidean norm along the last dimension."""
    return (wide(x) * torch.rsqrt(wide(x).square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)
