"""The HGRN2 layer: gated linear attention with ``k = 1 - f`` and forget gates bounded from below.

The bound rises from layer to layer: later layers remember for longer.
Attribute names are those of flash-linear-attention's checkpoints.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from statex_dist.models.fla_block import FLABlock, add_convolutions, add_mix, convolve, linear_attention
from statex_dist.models.hgrn2.config import HGRN2Config
from statex_dist.models.layout import HeldHeads
from statex_dist.models.norm import RMSNorm
from statex_dist.models.sequence import LayerState, Sequences
from statex_dist.ops.precision import wide_dtype

OUTPUT_NORM_EPS = 1e-5
"""Of the norm behind the scan: flash-linear-attention's layer leaves it at its kernel's default, whatever ``norm_eps``
says, in every release from 0.1.0 to 0.6.0."""


def shared_inputs(trunk: nn.Module) -> list[list[torch.Tensor | None]]:
    """Return each layer's lower bound of the forget gate ``[hidden]``: a cumulative softmax, zero for the first."""
    logits = getattr(trunk, "lower_bounds", None)
    if logits is None:
        return []
    shares = logits.to(wide_dtype(logits.dtype)).softmax(0)
    return [[None, *(shares.cumsum(0) - shares[0])[1:].unbind(0)]]


class HGRN2Attention(nn.Module):
    """Token mixing of one layer (arXiv 2404.07904, section 3).

    Args:
        config: The model's configuration with its plan.
        layer: Index of the layer.
    """

    mix: nn.Parameter | None

    def __init__(self, config: HGRN2Config, layer: int):
        super().__init__()
        hidden = config.hidden_size
        self.config, self.geometry = config, config.layer_geometry(layer)
        self.heads = HeldHeads.of(self.geometry)
        self.q_proj = nn.Linear(hidden, hidden, bias=False)
        self.f_proj = nn.Linear(hidden, hidden, bias=False)
        self.i_proj = nn.Linear(hidden, hidden, bias=False)
        if config.use_short_conv:
            add_convolutions(self, dict.fromkeys("qfi", hidden), config.conv_size)
        self.g_norm = RMSNorm(hidden, eps=OUTPUT_NORM_EPS)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)
        add_mix(self, self.geometry)

    def forward(
        self,
        x: torch.Tensor,
        sequences: Sequences,
        state: LayerState | None,
        lower_bound: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, LayerState | None]:
        """Mix tokens.

        Args:
            x: ``[B, T, hidden]``.
            sequences: Borders of packed sequences and what to return.
            state: The layer's state before ``x``, or None for zero.
            lower_bound: ``[hidden]``, of the forget gate; None for zero.

        Returns:
            ``[B, T, hidden]`` and the state after ``x`` (None unless asked for).
        """
        q, f, i = self.q_proj(x), self.f_proj(x), self.i_proj(x)
        state, memory = sequences.split(state)
        recurrent, tail = state[0] if state else None, state[1] if state and self.config.use_short_conv else None
        new_tail: tuple[torch.Tensor, ...] = ()
        if self.config.use_short_conv:
            (q, f, i), new_tail = convolve(self, "qfi", (q, f, i), sequences, tail, activation=False)
        q = F.silu(q)
        g = F.logsigmoid(f.to(wide_dtype(f.dtype)))
        if lower_bound is not None:
            lower_bound = lower_bound[self.heads.key_channels]
            g = torch.logaddexp(lower_bound.log(), torch.log1p(-lower_bound) + g)
        k = (1 - g.exp()).to(i.dtype)
        q, k, g = (y.unflatten(-1, (self.heads.keys, -1)) for y in (q, k, g))
        v = i.unflatten(-1, (self.heads.values, -1))
        o, recurrent, memory = linear_attention(
            q, k, v, g, recurrent, sequences, heads=self.heads, mix=self.mix, memory=memory
        )
        new_state = None if recurrent is None else (recurrent, *new_tail, *memory)
        return self.o_proj(self.g_norm(o.to(x.dtype).flatten(-2))), new_state


class Block(FLABlock):
    """One pre-norm HGRN2 layer."""

    mixing = HGRN2Attention
