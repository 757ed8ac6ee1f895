"""The Gated DeltaNet layer, with the attribute names of flash-linear-attention's checkpoints."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from statex_dist.models.delta_mixer import DeltaAttention
from statex_dist.models.fla_block import FLABlock
from statex_dist.models.gated_deltanet.config import GatedDeltaNetConfig
from statex_dist.models.norm import GatedRMSNorm, RMSNorm
from statex_dist.ops.precision import wide_dtype


class GatedDeltaNet(DeltaAttention):
    """Token mixing of one layer (arXiv 2412.06464, section 3)."""

    def __init__(self, config: GatedDeltaNetConfig, layer: int):
        super().__init__(config, layer)
        size = config.head_value_dim
        self.a_proj = nn.Linear(config.hidden_size, config.value_heads, bias=False)
        self.dt_bias = nn.Parameter(torch.zeros(config.value_heads))
        self.use_gate = config.use_gate
        self.o_norm: RMSNorm
        if config.use_gate:
            self.g_proj = nn.Linear(config.hidden_size, config.value_dim, bias=False)
            sigmoid = config.output_gate_activation == "sigmoid"
            self.o_norm = GatedRMSNorm(size, eps=config.norm_eps, norm_before_gate=True, sigmoid=sigmoid)
        else:
            self.o_norm = RMSNorm(size, eps=config.norm_eps)

    def log_decays(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``-exp(A_log) softplus(a(x) + dt_bias)``, one per value head."""
        a = self.a_proj(x)
        wide = wide_dtype(a.dtype)
        step = F.softplus(a.to(wide) + self.dt_bias.to(wide))
        return (-self.A_log.to(wide).exp() * step).unsqueeze(-1)

    def gated(self, o: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return the normed outputs, gated unless the model has no gate."""
        return self.o_norm(o, self.g_proj(x).unflatten(-1, o.shape[-2:])) if self.use_gate else self.o_norm(o)


class Block(FLABlock):
    """One pre-norm Gated DeltaNet layer."""

    mixing = GatedDeltaNet
