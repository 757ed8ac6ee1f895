"""The KDA layer, with the attribute names of flash-linear-attention's checkpoints."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from statex_dist.models.core.layers import FLABlock, GatedRMSNorm
from statex_dist.models.gated_deltanet.mixer import DeltaAttention
from statex_dist.models.kda.config import KDAConfig


class KimiDeltaAttention(DeltaAttention):
    """Token mixing of one layer (arXiv 2510.26692, section 3)."""

    def __init__(self, config: KDAConfig, layer: int):
        super().__init__(config, layer)
        self.lower_bound = config.lower_bound
        hidden, rank = config.hidden_size, config.head_value_dim
        self.f_proj = nn.Sequential(nn.Linear(hidden, rank, bias=False), nn.Linear(rank, config.gate_dim, bias=False))
        self.dt_bias = nn.Parameter(torch.zeros(config.gate_dim))
        self.g_proj = nn.Sequential(nn.Linear(hidden, rank, bias=False), nn.Linear(rank, config.value_dim))
        self.o_norm = GatedRMSNorm(rank, eps=config.norm_eps, norm_before_gate=True, sigmoid=True)

    def log_decays(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``-exp(A_log) softplus(f(x) + dt_bias)``; with a bound, ``bound sigmoid(exp(A_log) (...))``."""
        f = self.f_proj(x)
        wide = torch.promote_types(f.dtype, torch.float32)
        f = (f.to(wide) + self.dt_bias.to(wide)).unflatten(-1, (self.heads.decays, -1))
        rate = self.A_log.to(wide).exp().unsqueeze(-1)
        if self.lower_bound is not None:
            return self.lower_bound * torch.sigmoid(rate * f)
        return -rate * F.softplus(f)

    def gated(self, o: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return the normed outputs times the sigmoid of their gate."""
        return self.o_norm(o, self.g_proj(x).unflatten(-1, o.shape[-2:]))


class KDABlock(FLABlock):
    """One pre-norm KDA layer."""

    mixing = KimiDeltaAttention
