"""Delta-rule and Lightning mixers with the parameters of further hosts: Qwen3.5, OLMo-hybrid, Kimi-Linear, MiniMax."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from statex_dist.models.core.layers import GatedRMSNorm
from statex_dist.models.core.mixer import DeltaRule, Tokens, depthwise
from statex_dist.models.gated_deltanet.mixer import unit
from statex_dist.models.hybrid.delta import GatedDeltaLayers, KimiDeltaLayers
from statex_dist.models.hybrid.mixers import HostCall, HostedGatedDelta, HostedMixer
from statex_dist.models.lightning.mixer import LightningAttention
from statex_dist.ops.mitigations import Tensors


class HostedSplitGatedDelta(HostedGatedDelta):
    """Gated DeltaNet layers of Qwen3.5: one projection of queries, keys and values, and one of each gate."""

    def add_projections(self, config: GatedDeltaLayers) -> None:
        """Add the input projections under the host's names."""
        hidden, heads = config.hidden_size, config.value_heads
        self.in_proj_qkv = nn.Linear(hidden, 2 * config.key_dim + config.value_dim, bias=False)
        self.in_proj_z = nn.Linear(hidden, config.value_dim, bias=False)
        self.in_proj_b = nn.Linear(hidden, heads, bias=False)
        self.in_proj_a = nn.Linear(hidden, heads, bias=False)

    def project(self, x: torch.Tensor) -> tuple[Tensors, Tensors]:
        """Return queries, keys and values as one tensor, and ``z``, ``b``, ``a`` beside it."""
        return (self.in_proj_qkv(x),), (self.in_proj_z(x), self.in_proj_b(x), self.in_proj_a(x))

    def queries_keys_values(self, tokens: Tokens) -> Tensors:
        """Return queries, keys and values ``[B, T, channels]``."""
        keys, values = self.layers.key_dim, self.layers.value_dim
        return tokens.convolved[0].split([keys, keys, values], dim=-1)


class HostedSeparateGatedDelta(HostedGatedDelta):
    """Gated DeltaNet layers of OLMo-hybrid: a projection of each input, the names of flash-linear-attention's."""

    NORM, OUT = "o_norm", "o_proj"

    def add_projections(self, config: GatedDeltaLayers) -> None:
        """Add the input projections under the host's names."""
        hidden = config.hidden_size
        self.q_proj = nn.Linear(hidden, config.key_dim, bias=False)
        self.k_proj = nn.Linear(hidden, config.key_dim, bias=False)
        self.v_proj = nn.Linear(hidden, config.value_dim, bias=False)
        self.a_proj = nn.Linear(hidden, config.value_heads, bias=False)
        self.b_proj = nn.Linear(hidden, config.value_heads, bias=False)
        self.g_proj = nn.Linear(hidden, config.value_dim, bias=False)

    def project(self, x: torch.Tensor) -> tuple[Tensors, Tensors]:
        """Return queries, keys and values, and the output gate, ``b``, ``a`` beside them."""
        return (self.q_proj(x), self.k_proj(x), self.v_proj(x)), (self.g_proj(x), self.b_proj(x), self.a_proj(x))


class ForgetGate(nn.Module):
    """The log decays of a Kimi-Linear layer, of a projection of low rank."""

    def __init__(self, config: KimiDeltaLayers):
        super().__init__()
        rank = config.head_value_dim
        self.f_a_proj = nn.Linear(config.hidden_size, rank, bias=False)
        self.f_b_proj = nn.Linear(rank, config.gate_dim, bias=False)
        self.dt_bias = nn.Parameter(torch.zeros(config.gate_dim))
        self.A_log = nn.Parameter(torch.zeros(1, 1, config.value_heads, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``-exp(A_log) softplus(f(x) + dt_bias)``, ``[B, T, H, K]``."""
        f = self.f_b_proj(self.f_a_proj(x))
        wide = torch.promote_types(f.dtype, torch.float32)
        steps = F.softplus((f.to(wide) + self.dt_bias.to(wide)).unflatten(-1, (self.A_log.shape[2], -1)))
        return -self.A_log.to(wide).exp() * steps


class HostedKimiDelta(HostedMixer, DeltaRule):
    """Kimi Delta Attention (arXiv 2510.26692) with the parameters of Kimi-Linear."""

    def __init__(self, config: KimiDeltaLayers, layer: int):
        super().__init__(config.layer_geometry(layer))
        hidden, keys, values, rank = config.hidden_size, config.key_dim, config.value_dim, config.head_value_dim
        self.q_proj = nn.Linear(hidden, keys, bias=False)
        self.k_proj = nn.Linear(hidden, keys, bias=False)
        self.v_proj = nn.Linear(hidden, values, bias=False)
        self.conv1d = depthwise(2 * keys + values, config.conv_size)
        self.forget_gate = ForgetGate(config)
        self.b_proj = nn.Linear(hidden, config.value_heads, bias=False)
        self.g_a_proj = nn.Linear(hidden, rank, bias=False)
        self.g_b_proj = nn.Linear(rank, values, bias=False)
        self.o_norm = GatedRMSNorm(rank, eps=config.norm_eps, norm_before_gate=True, sigmoid=True)
        self.o_proj = nn.Linear(values, hidden, bias=False)
        self.add_expansion()

    def project(self, x: torch.Tensor) -> tuple[Tensors, Tensors]:
        """Return queries, keys and values, and log decays, strengths and output gate beside them."""
        gate = self.g_b_proj(self.g_a_proj(x))
        return (self.q_proj(x), self.k_proj(x), self.v_proj(x)), (self.forget_gate(x), self.b_proj(x), gate)

    def conv_weights(self) -> tuple[torch.Tensor, None]:
        """Return the convolution's weight."""
        return self.conv1d.weight, None

    def scan_inputs(self, tokens: Tokens) -> Tensors:
        """Return ``q, k, v, g, beta``."""
        (q, k, v), (g, b, _) = tokens.convolved, tokens.others
        q, k = (unit(y.unflatten(-1, (self.heads.keys, -1))) for y in (q, k))
        beta = torch.sigmoid(b.to(torch.promote_types(b.dtype, torch.float32)))
        return q, k, v.unflatten(-1, (self.heads.values, -1)), g, beta

    def output(self, o: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        """Return the projection of the normed and gated outputs."""
        return self.o_proj(self.o_norm(o, tokens.others[2].unflatten(-1, o.shape[-2:])).flatten(-2))


class HostedLightning(HostedMixer, LightningAttention):
    """Lightning attention of MiniMax models that have softmax layers too."""

    def forward(  # type: ignore[override]
        self, hidden_states: torch.Tensor, *, statex: HostCall | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        """Mix tokens ``[B, T, hidden]``; the host's layer takes a pair, whose second entry it does not read."""
        return super().forward(hidden_states, statex=statex, **kwargs), None
