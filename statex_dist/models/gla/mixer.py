"""The GLA layer: token mixing by gated linear attention, channel mixing by a SwiGLU MLP.

One class serves the original geometry, merged and mixed heads and grown keys; which one a layer has follows from the
plan in the configuration. Attribute names are those of flash-linear-attention's checkpoints.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from statex_dist.models.fla_block import FLABlock, add_convolutions, add_mix, convolve, linear_attention
from statex_dist.models.gla.config import GATE_LOW_RANK_DIM, GLAConfig
from statex_dist.models.layout import HeldHeads
from statex_dist.models.norm import GatedRMSNorm
from statex_dist.models.sequence import LayerState, Sequences
from statex_dist.ops.precision import wide_dtype


class GatedLinearAttention(nn.Module):
    """Token mixing of one layer (arXiv 2312.06635, section 4.4).

    Args:
        config: The model's configuration with its plan.
        layer: Index of the layer.
    """

    mix: nn.Parameter | None

    def __init__(self, config: GLAConfig, layer: int):
        super().__init__()
        self.config = config
        self.geometry = config.layer_geometry(layer)
        self.heads = HeldHeads.of(self.geometry)
        hidden, values = config.hidden_size, config.value_dim
        keys = self.geometry.num_heads * self.geometry.key_dim
        self.q_proj = nn.Linear(hidden, keys, bias=False)
        self.k_proj = nn.Linear(hidden, keys, bias=False)
        self.v_proj = nn.Linear(hidden, values, bias=False)
        self.g_proj = nn.Linear(hidden, values, bias=False)
        self.add_gates(keys)
        self.o_proj = nn.Linear(values, hidden, bias=False)
        norm = GatedRMSNorm(self.geometry.value_dim, eps=config.norm_eps, norm_before_gate=True)
        self._norm_name = "g_norm_swish_gate" if config.fuse_norm else "g_norm"
        self.add_module(self._norm_name, norm)
        if config.use_short_conv:
            add_convolutions(self, {"q": keys, "k": keys, "v": values}, config.conv_size)
        add_mix(self, self.geometry)
        # A merged head has a scale of its own; mixed and grown ones keep that of the original keys.
        self.scale = config.scale if self.geometry.num_heads == config.num_heads else self.geometry.key_dim**-0.5

    def add_gates(self, keys: int) -> None:
        """Add what the log decays are computed from: a low-rank projection."""
        self.gk_proj = nn.Sequential(
            nn.Linear(self.config.hidden_size, GATE_LOW_RANK_DIM, bias=False), nn.Linear(GATE_LOW_RANK_DIM, keys)
        )

    def forward(
        self, x: torch.Tensor, sequences: Sequences, state: LayerState | None
    ) -> tuple[torch.Tensor, LayerState | None]:
        """Mix tokens.

        Args:
            x: ``[B, T, hidden]``.
            sequences: Borders of packed sequences and what to return.
            state: The layer's state before ``x``, or None for zero.

        Returns:
            ``[B, T, hidden]`` and the state after ``x`` (None unless asked for).
        """
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        state, memory = sequences.split(state)
        recurrent, tail = state[0] if state else None, state[-1] if state and self.config.use_short_conv else None
        new_tail: tuple[torch.Tensor, ...] = ()
        if self.config.use_short_conv:
            (q, k, v), new_tail = convolve(self, "qkv", (q, k, v), sequences, tail)
        q, k, g, position = self.queries_keys_decays(q, k, x, sequences, state)
        q, k, g = (y.unflatten(-1, (self.heads.keys, -1)) for y in (q, k, g))
        v, gate = (y.unflatten(-1, (self.heads.values, -1)) for y in (v, self.g_proj(x)))
        o, recurrent, memory = linear_attention(
            q, k, v, g, recurrent, sequences, heads=self.heads, scale=self.scale, mix=self.mix, memory=memory
        )
        o = self.get_submodule(self._norm_name)(o.to(x.dtype), gate)
        new_state = None if recurrent is None else (recurrent, *position, *new_tail, *memory)
        return self.o_proj(o.flatten(-2)), new_state

    def queries_keys_decays(
        self, q: torch.Tensor, k: torch.Tensor, x: torch.Tensor, sequences: Sequences, state: LayerState | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
        """Return queries, keys and log decays ``[B, T, keys]``, and what else the layer's state holds (nothing)."""
        logits = self.gk_proj(x)
        g = F.logsigmoid(logits.to(wide_dtype(logits.dtype))) / self.config.gate_logit_normalizer
        if self.config.clamp_min is not None:
            g = g.clamp(min=self.config.clamp_min)
        return q, k, g, ()


class Block(FLABlock):
    """One pre-norm GLA layer."""

    mixing = GatedLinearAttention
