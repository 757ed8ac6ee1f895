"""The Gated DeltaNet layer and what KDA shares of it, with the names of flash-linear-attention's checkpoints."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from statex_dist.models.core.layers import FLABlock, GatedRMSNorm, RMSNorm
from statex_dist.models.core.mixer import DeltaRule, Tokens, depthwise
from statex_dist.models.gated_deltanet.config import DeltaRuleConfig, GatedDeltaNetConfig
from statex_dist.ops.mitigations import Tensors

KEY_NORM_EPS = 1e-6


class DeltaAttention(DeltaRule):
    """Token mixing of one layer; a family adds its decays (``log_decays``) and its output gate (``gated``)."""

    def __init__(self, config: DeltaRuleConfig, layer: int):
        super().__init__(config.layer_geometry(layer))
        hidden, keys, values = config.hidden_size, config.key_dim, config.value_dim
        self.use_short_conv, self.beta_factor = config.use_short_conv, 2 if config.allow_neg_eigval else 1
        self.q_proj = nn.Linear(hidden, keys, bias=False)
        self.k_proj = nn.Linear(hidden, keys, bias=False)
        self.v_proj = nn.Linear(hidden, values, bias=False)
        self.b_proj = nn.Linear(hidden, config.value_heads, bias=False)
        self.A_log = nn.Parameter(torch.zeros(config.value_heads))
        if config.use_short_conv:
            self.q_conv1d, self.k_conv1d, self.v_conv1d = (
                depthwise(size, config.conv_size) for size in (keys, keys, values)
            )
        self.o_proj = nn.Linear(values, hidden, bias=False)
        self.add_expansion()

    def log_decays(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``[B, T, HV, 1]`` or ``[B, T, HV, K]`` log decays, at most 0, in a wide dtype."""
        raise NotImplementedError

    def gated(self, o: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return the normed and gated outputs ``[B, T, HV, V]``."""
        raise NotImplementedError

    def project(self, x: torch.Tensor) -> tuple[Tensors, Tensors]:
        """Return queries, keys and values."""
        return (self.q_proj(x), self.k_proj(x), self.v_proj(x)), ()

    def conv_weights(self) -> tuple[torch.Tensor, None]:
        """Return the weight of all three convolutions."""
        return torch.cat([self.q_conv1d.weight, self.k_conv1d.weight, self.v_conv1d.weight]), None

    def scan_inputs(self, tokens: Tokens) -> Tensors:
        """Return ``q, k, v, g, beta``; without convolutions the SiLU is taken of the projections."""
        q, k, v = tokens.convolved if self.use_short_conv else map(F.silu, tokens.convolved)
        q, k = (unit(y.unflatten(-1, (self.heads.keys, -1))) for y in (q, k))
        beta = self.b_proj(tokens.x)
        beta = torch.sigmoid(beta.to(torch.promote_types(beta.dtype, torch.float32))) * self.beta_factor
        return q, k, v.unflatten(-1, (self.heads.values, -1)), self.log_decays(tokens.x), beta

    def output(self, o: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        """Return the projection of the normed and gated outputs."""
        return self.o_proj(self.gated(o, tokens.x).flatten(-2))


def unit(x: torch.Tensor) -> torch.Tensor:
    """Return ``x`` over its Euclidean norm along the last dimension."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + KEY_NORM_EPS)).to(x.dtype)


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
        wide = torch.promote_types(a.dtype, torch.float32)
        step = F.softplus(a.to(wide) + self.dt_bias.to(wide))
        return (-self.A_log.to(wide).exp() * step).unsqueeze(-1)

    def gated(self, o: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return the normed outputs, gated unless the model has no gate."""
        return self.o_norm(o, self.g_proj(x).unflatten(-1, o.shape[-2:])) if self.use_gate else self.o_norm(o)


class GatedDeltaNetBlock(FLABlock):
    """One pre-norm Gated DeltaNet layer."""

    mixing = GatedDeltaNet
