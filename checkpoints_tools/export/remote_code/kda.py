"""Kimi Delta Attention (arXiv 2510.26692): the delta rule with one decay per key channel."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .configuration import PlannedConfig
from .delta_block import DeltaAttention, DeltaConfig
from .fla_block import FLABlock
from .gated_norm import GatedRMSNorm
from .layers import wide
from .trunk import Trunk


class StateXConfig(DeltaConfig):
    """Configuration of a KDA model."""

    model_type = "kda"
    __init__ = PlannedConfig.__init__  # transformers 5 makes one of its own for a class without


class KimiDeltaAttention(DeltaAttention):
    """Token mixing of one layer."""

    def __init__(self, config: Any, layer: int):
        super().__init__(config, layer)
        hidden, rank, heads = config.hidden_size, config.head_value_dim, config.value_heads
        keys = heads * config.head_dim
        self.f_proj = nn.Sequential(nn.Linear(hidden, rank, bias=False), nn.Linear(rank, keys, bias=False))
        self.dt_bias = nn.Parameter(torch.zeros(keys))
        self.g_proj = nn.Sequential(nn.Linear(hidden, rank, bias=False), nn.Linear(rank, heads * rank))
        self.o_norm = GatedRMSNorm(rank, config.norm_eps, sigmoid=True)

    def log_decays(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``-exp(A_log) softplus(f(x) + dt_bias)``; with a bound, ``bound sigmoid(exp(A_log) (...))``."""
        f = (wide(self.f_proj(x)) + wide(self.dt_bias)).unflatten(-1, (self.config.value_heads, -1))
        rate = wide(self.A_log).exp().unsqueeze(-1)
        if self.config.lower_bound is not None:
            return self.config.lower_bound * torch.sigmoid(rate * f)
        return -rate * F.softplus(f)

    def gated(self, o: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return the normed outputs times the sigmoid of their gate."""
        return self.o_norm(o, self.g_proj(x).unflatten(-1, o.shape[-2:]))


class Block(FLABlock):
    """One KDA layer."""

    mixing = KimiDeltaAttention


class StateXModel(Trunk):
    """KDA without its head."""

    config_class = StateXConfig
    base_model_prefix = "model"
    block = Block
