"""The GLA layer: token mixing by gated linear attention, channel mixing by a SwiGLU MLP.

One class serves the original geometry, merged and mixed heads and grown keys; which one a layer has follows from the
plan in the configuration. Attribute names are those of flash-linear-attention's checkpoints.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from statex_dist.models.core.layers import FLABlock, GatedRMSNorm
from statex_dist.models.core.mixer import LinearAttention, Tokens, depthwise
from statex_dist.models.gla.config import GATE_LOW_RANK_DIM, GLAConfig
from statex_dist.ops.mitigations import Tensors


class GatedLinearAttention(LinearAttention):
    """Token mixing of one layer (arXiv 2312.06635, section 4.4)."""

    g_norm: GatedRMSNorm
    g_norm_swish_gate: GatedRMSNorm

    def __init__(self, config: GLAConfig, layer: int):
        geometry = config.layer_geometry(layer)
        # A merged head has a scale of its own; mixed and grown ones keep that of the original keys.
        super().__init__(geometry, scale=config.scale if geometry.num_heads == config.num_heads else None)
        self.config = config
        hidden, values, keys = config.hidden_size, config.value_dim, geometry.num_heads * geometry.projected_key_dim
        self.q_proj = nn.Linear(hidden, keys, bias=False)
        self.k_proj = nn.Linear(hidden, keys, bias=False)
        self.v_proj = nn.Linear(hidden, values, bias=False)
        self.g_proj = nn.Linear(hidden, values, bias=False)
        self.add_gates(keys)
        self.o_proj = nn.Linear(values, hidden, bias=False)
        norm = GatedRMSNorm(geometry.value_dim, eps=config.norm_eps, norm_before_gate=True)
        self.add_module("g_norm_swish_gate" if config.fuse_norm else "g_norm", norm)
        if config.use_short_conv:
            self.q_conv1d, self.k_conv1d, self.v_conv1d = (
                depthwise(size, config.conv_size) for size in (keys, keys, values)
            )
        self.add_expansion()

    def add_gates(self, keys: int) -> None:
        """Add what the log decays are computed from: a low-rank projection."""
        self.gk_proj = nn.Sequential(
            nn.Linear(self.config.hidden_size, GATE_LOW_RANK_DIM, bias=False), nn.Linear(GATE_LOW_RANK_DIM, keys)
        )

    def project(self, x: torch.Tensor) -> tuple[Tensors, Tensors]:
        """Return queries, keys and values."""
        return (self.q_proj(x), self.k_proj(x), self.v_proj(x)), ()

    def conv_weights(self) -> tuple[torch.Tensor, None]:
        """Return the weight of all three convolutions."""
        return torch.cat([self.q_conv1d.weight, self.k_conv1d.weight, self.v_conv1d.weight]), None

    def queries_keys_decays(self, tokens: Tokens) -> Tensors:
        """Return queries, keys and log decays ``[B, T, keys]``."""
        q, k, _ = tokens.convolved
        logits = self.gk_proj(tokens.x)
        g = (
            F.logsigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32)))
            / self.config.gate_logit_normalizer
        )
        return q, k, g if self.config.clamp_min is None else g.clamp(min=self.config.clamp_min)

    def scan_inputs(self, tokens: Tokens) -> Tensors:
        """Return ``q, k, v, g``."""
        q, k, g = (y.unflatten(-1, (self.heads.keys, -1)) for y in self.queries_keys_decays(tokens))
        return q, k, tokens.convolved[2].unflatten(-1, (self.heads.values, -1)), g

    def output(self, o: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        """Return the projection of the normed and gated outputs."""
        norm = self.g_norm_swish_gate if self.config.fuse_norm else self.g_norm
        gate = self.g_proj(tokens.x).unflatten(-1, (self.heads.values, -1))
        return self.o_proj(norm(o, gate).flatten(-2))


class GLABlock(FLABlock):
    """One pre-norm GLA layer."""

    mixing = GatedLinearAttention
