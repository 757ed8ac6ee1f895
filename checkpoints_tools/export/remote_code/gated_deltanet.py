"""Gated DeltaNet (arXiv 2412.06464): the delta rule with one decay per head."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .configuration import PlannedConfig
from .delta_block import DeltaAttention, DeltaConfig
from .fla_block import FLABlock
from .gated_norm import GatedRMSNorm
from .layers import RMSNorm, wide
from .trunk import Trunk


class StateXConfig(DeltaConfig):
    """Configuration of a Gated DeltaNet model."""

    model_type = "gated_deltanet"
    __init__ = PlannedConfig.__init__  # transformers 5 makes one of its own for a class without


class GatedDeltaNet(DeltaAttention):
    """Token mixing of one layer."""

    def __init__(self, config: Any, layer: int):
        super().__init__(config, layer)
        size, heads = config.head_value_dim, config.value_heads
        self.a_proj = nn.Linear(config.hidden_size, heads, bias=False)
        self.dt_bias = nn.Parameter(torch.zeros(heads))
        self.o_norm: RMSNorm
        if config.use_gate:
            self.g_proj = nn.Linear(config.hidden_size, heads * size, bias=False)
            sigmoid = config.output_gate_activation == "sigmoid"
            self.o_norm = GatedRMSNorm(size, config.norm_eps, sigmoid=sigmoid)
        else:
            self.o_norm = RMSNorm(size, config.norm_eps)

    def log_decays(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``-exp(A_log) softplus(a(x) + dt_bias)``, one per value head."""
        step = F.softplus(wide(self.a_proj(x)) + wide(self.dt_bias))
        return (-wide(self.A_log).exp() * step).unsqueeze(-1)

    def gated(self, o: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return the normed outputs, gated unless the model has no gate."""
        return self.o_norm(o, self.g_proj(x).unflatten(-1, o.shape[-2:])) if self.config.use_gate else self.o_norm(o)


class Block(FLABlock):
    """One Gated DeltaNet layer."""

    mixing = GatedDeltaNet


class StateXModel(Trunk):
    """Gated DeltaNet without its head."""

    config_class = StateXConfig
    base_model_prefix = "model"
    block = Block
