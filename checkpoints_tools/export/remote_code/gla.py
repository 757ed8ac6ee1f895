"""Gated linear attention (arXiv 2312.06635)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .cache import Tokens
from .configuration import PlannedConfig
from .fla_block import FLABlock, FLAConfig
from .gla_block import GatedMixing
from .layers import wide
from .trunk import Trunk


class StateXConfig(FLAConfig):
    """Configuration of a GLA model."""

    model_type = "gla"
    __init__ = PlannedConfig.__init__  # transformers 5 makes one of its own for a class without

    @property
    def key_dim(self) -> int:
        """Key channels of all heads together, before the plan."""
        return round(self.hidden_size * self.expand_k)

    @property
    def value_dim(self) -> int:
        """Value channels of all heads together."""
        return round(self.hidden_size * self.expand_v)


class GatedLinearAttention(GatedMixing):
    """Token mixing of one layer."""

    def add_gates(self, keys: int) -> None:
        """Add a low-rank projection."""
        self.gk_proj = nn.Sequential(nn.Linear(self.config.hidden_size, 16, bias=False), nn.Linear(16, keys))

    def queries_keys_decays(
        self, q: torch.Tensor, k: torch.Tensor, x: torch.Tensor, tokens: Tokens
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return queries, keys and log decays ``[B, T, keys]``."""
        g = F.logsigmoid(wide(self.gk_proj(x))) / self.config.gate_logit_normalizer
        return q, k, g if self.config.clamp_min is None else g.clamp(min=self.config.clamp_min)


class Block(FLABlock):
    """One GLA layer."""

    mixing = GatedLinearAttention


class StateXModel(Trunk):
    """GLA without its head."""

    config_class = StateXConfig
    base_model_prefix = "model"
    block = Block
