"""Token mixing that Gated DeltaNet and KDA share: short convolutions, normalised keys, the scan, gate and output."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from statex_dist.models.delta_rule import DeltaRuleConfig
from statex_dist.models.fla_block import add_convolutions, add_mix, convolve
from statex_dist.models.layout import HeldHeads
from statex_dist.models.mitigated import mitigated_delta
from statex_dist.models.mixed_head_tp import PartnerHeads
from statex_dist.models.sequence import LayerState, Sequences
from statex_dist.ops.delta_rule import delta_decode, delta_rule
from statex_dist.ops.precision import wide_dtype

_NORM_EPS = 1e-6


class DeltaAttention(nn.Module):
    """Token mixing of one layer; a family adds its decays (``log_decays``) and its output gate (``gated``).

    Args:
        config: The model's configuration with its plan.
        layer: Index of the layer.
    """

    mix: nn.Parameter | None

    def __init__(self, config: DeltaRuleConfig, layer: int):
        super().__init__()
        hidden, keys, values = config.hidden_size, config.key_dim, config.value_dim
        self.config, self.geometry = config, config.layer_geometry(layer)
        self.heads = HeldHeads.of(self.geometry)
        self.q_proj = nn.Linear(hidden, keys, bias=False)
        self.k_proj = nn.Linear(hidden, keys, bias=False)
        self.v_proj = nn.Linear(hidden, values, bias=False)
        self.b_proj = nn.Linear(hidden, config.value_heads, bias=False)
        self.A_log = nn.Parameter(torch.zeros(config.value_heads))
        if config.use_short_conv:
            add_convolutions(self, {"q": keys, "k": keys, "v": values}, config.conv_size)
        self.o_proj = nn.Linear(values, hidden, bias=False)
        add_mix(self, self.geometry)

    def log_decays(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``[B, T, HV, 1]`` or ``[B, T, HV, K]`` log decays, at most 0, in a wide dtype."""
        raise NotImplementedError

    def gated(self, o: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return the normed and gated outputs ``[B, T, HV, V]``."""
        raise NotImplementedError

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
        recurrent, tail = state[0] if state else None, state[1] if state and self.config.use_short_conv else None
        new_tail: tuple[torch.Tensor, ...] = ()
        if self.config.use_short_conv:
            (q, k, v), new_tail = convolve(self, "qkv", (q, k, v), sequences, tail)
        else:
            q, k, v = F.silu(q), F.silu(k), F.silu(v)
        q, k = (_normalize(y.unflatten(-1, (self.heads.keys, -1))) for y in (q, k))
        v = v.unflatten(-1, (self.heads.values, -1))
        beta = self.b_proj(x)
        beta = torch.sigmoid(beta.to(wide_dtype(beta.dtype))) * (2 if self.config.allow_neg_eigval else 1)
        g = self.log_decays(x)
        pairs, mix = PartnerHeads.where_needed(self.heads), self.mix
        if pairs is not None:
            q, k, g, beta = (pairs.by_key(y) for y in (q, k, g, beta))
            v, mix = pairs.by_value(v), None

        def scan(inputs: LayerState, before: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
            q, k, v, g, beta = inputs
            if q.shape[1] == 1 and before is not None and sequences.cu_seqlens is None:
                q, k, v, g, beta = (y.squeeze(1) for y in inputs)
                o, after = delta_decode(q, k, v, g, beta, before, mix=mix, overwrite=sequences.overwrites)
                return o.unsqueeze(1), after
            return delta_rule(
                q,
                k,
                v,
                g,
                beta,
                mix=mix,
                initial_state=before,
                cu_seqlens=sequences.cu_seqlens,
                backend=sequences.backend,  # type: ignore[arg-type]
                chunk_size=sequences.chunk_size,
                context=sequences.context,
            )

        inputs = (q, k, v, g, beta)
        if sequences.mitigation is None:
            o, recurrent = scan(inputs, recurrent)
        else:
            o, recurrent, memory = mitigated_delta(sequences.mitigation, scan, inputs, recurrent, memory)
        if pairs is not None:
            assert self.mix is not None
            o = pairs.read(o, self.mix)
        assert recurrent is not None
        new_state = (recurrent, *new_tail, *memory) if sequences.output_states else None
        return self.o_proj(self.gated(o.to(x.dtype), x).flatten(-2)), new_state


def _normalize(x: torch.Tensor) -> torch.Tensor:
    """Return ``x`` over its Euclidean norm along the last dimension."""
    wide = x.to(wide_dtype(x.dtype))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + _NORM_EPS)).to(x.dtype)
