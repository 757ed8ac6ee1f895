"""The GLA layer: token mixing by gated linear attention, channel mixing by a SwiGLU MLP.

One class serves the original geometry, merged heads and mixed heads; which one a layer has follows from the plan in the
configuration. Attribute names are those of flash-linear-attention's checkpoints.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from statex_dist.models.gla.config import GATE_LOW_RANK_DIM, GLAConfig
from statex_dist.models.norm import GatedRMSNorm, RMSNorm
from statex_dist.models.sequence import LayerState, Sequences
from statex_dist.ops.conv import causal_conv, conv_tail
from statex_dist.ops.dispatch import gla, gla_decode
from statex_dist.ops.precision import wide_dtype


class GatedLinearAttention(nn.Module):
    """Token mixing of one layer (arXiv 2312.06635, section 4.4).

    Args:
        config: The model's configuration with its plan.
        layer: Index of the layer.
    """

    def __init__(self, config: GLAConfig, layer: int):
        super().__init__()
        hidden, keys, values = config.hidden_size, config.key_dim, config.value_dim
        self.config = config
        self.geometry = config.layer_geometry(layer)
        self.q_proj = nn.Linear(hidden, keys, bias=False)
        self.k_proj = nn.Linear(hidden, keys, bias=False)
        self.v_proj = nn.Linear(hidden, values, bias=False)
        self.g_proj = nn.Linear(hidden, values, bias=False)
        self.gk_proj = nn.Sequential(
            nn.Linear(hidden, GATE_LOW_RANK_DIM, bias=False), nn.Linear(GATE_LOW_RANK_DIM, keys)
        )
        self.o_proj = nn.Linear(values, hidden, bias=False)
        norm = GatedRMSNorm(self.geometry.value_dim, eps=config.norm_eps, norm_before_gate=True)
        self._norm_name = "g_norm_swish_gate" if config.fuse_norm else "g_norm"
        self.add_module(self._norm_name, norm)
        if config.use_short_conv:
            for name, channels in (("q", keys), ("k", keys), ("v", values)):
                self.add_module(
                    f"{name}_conv1d", nn.Conv1d(channels, channels, config.conv_size, groups=channels, bias=False)
                )
        if self.geometry.values_per_key > 1:
            self.mix = nn.Parameter(torch.zeros(self.geometry.num_heads, self.geometry.values_per_key))

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
        recurrent, tail = state[0] if state else None, state[1] if state and self.config.use_short_conv else None
        new_tail: tuple[torch.Tensor, ...] = ()
        if self.config.use_short_conv:
            (q, k, v), new_tail = self._convolve((q, k, v), sequences, tail)
        logits = self.gk_proj(x)
        g = F.logsigmoid(logits.to(wide_dtype(logits.dtype)))
        g = g / self.config.gate_logit_normalizer
        if self.config.clamp_min is not None:
            g = g.clamp(min=self.config.clamp_min)
        heads = (self.geometry.num_heads, -1)
        q, k, v, g, gate = (y.unflatten(-1, heads) for y in (q, k, v, g, self.g_proj(x)))
        mix = self.mix if self.geometry.values_per_key > 1 else None
        if x.shape[1] == 1 and recurrent is not None and sequences.cu_seqlens is None:
            q, k, v, g = (y.squeeze(1) for y in (q, k, v, g))
            o, recurrent = gla_decode(q, k, v, g, recurrent, mix=mix)
            o = o.unsqueeze(1)
        else:
            o, recurrent = gla(
                q,
                k,
                v,
                g.to(wide_dtype(q.dtype)),
                mix=mix,
                initial_state=recurrent,
                cu_seqlens=sequences.cu_seqlens,
                backend=sequences.backend,  # type: ignore[arg-type]
                chunk_size=sequences.chunk_size,
            )
        o = self.get_submodule(self._norm_name)(o.to(x.dtype), gate)
        new_state = (recurrent, *new_tail) if sequences.output_states else None
        return self.o_proj(o.flatten(-2)), new_state

    def _convolve(
        self, qkv: tuple[torch.Tensor, ...], sequences: Sequences, tail: torch.Tensor | None
    ) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """Convolve queries, keys and values, as one tensor: a depthwise convolution does not mix channels."""
        weights = torch.cat([self.get_submodule(f"{name}_conv1d").weight for name in "qkv"])  # type: ignore[misc]
        joined = torch.cat(qkv, dim=-1)
        out = F.silu(causal_conv(joined, weights, initial_state=tail, cu_seqlens=sequences.cu_seqlens))
        new_tail: tuple[torch.Tensor, ...] = ()
        if sequences.output_states:
            size = self.config.conv_size
            new_tail = (conv_tail(joined, size, initial_state=tail, cu_seqlens=sequences.cu_seqlens),)
        return out.split([y.shape[-1] for y in qkv], dim=-1), new_tail


class MLP(nn.Module):
    """SwiGLU channel mixing (arXiv 2002.05202)."""

    def __init__(self, hidden_size: int, inner_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, inner_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, inner_size, bias=False)
        self.down_proj = nn.Linear(inner_size, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``down(silu(gate(x)) * up(x))``."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One pre-norm GLA layer."""

    def __init__(self, config: GLAConfig, layer: int):
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attn = GatedLinearAttention(config, layer)
        self.mlp_norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = MLP(config.hidden_size, config.mlp_size)

    def forward(
        self, x: torch.Tensor, sequences: Sequences, state: LayerState | None = None
    ) -> tuple[torch.Tensor, LayerState | None]:
        """Return the layer's output ``[B, T, hidden]`` and its state after ``x``."""
        mixed, new_state = self.attn(self.attn_norm(x), sequences, state)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), new_state
