"""The Mamba2 layer, with transformers' attribute names and numerics.

``d_state`` may differ from layer to layer (the plan in the configuration); nothing else does.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from statex_dist.models.layout import HeldHeads
from statex_dist.models.mamba2.config import Mamba2Config
from statex_dist.models.mamba2.layout import conv_parts, in_proj_parts
from statex_dist.models.mitigated import mitigated_ssd
from statex_dist.models.norm import GatedRMSNorm, RMSNorm
from statex_dist.models.sequence import LayerState, Sequences
from statex_dist.ops.conv import convolve_sequences
from statex_dist.ops.precision import wide_dtype
from statex_dist.ops.ssd import ssd, ssd_decode


class Mamba2Mixer(nn.Module):
    """Token mixing of one layer (arXiv 2405.21060, figure 6).

    Args:
        config: The model's configuration with its plan.
        layer: Index of the layer.
    """

    def __init__(self, config: Mamba2Config, layer: int):
        super().__init__()
        self.config, self.geometry = config, config.layer_geometry(layer)
        self.heads = HeldHeads.of(self.geometry)
        num_rows = sum(rows for _, rows in in_proj_parts(config, layer))
        channels = sum(rows for _, rows in conv_parts(config, layer))
        self.in_proj = nn.Linear(config.hidden_size, num_rows, bias=config.use_bias)
        self.conv1d = nn.Conv1d(channels, channels, config.conv_kernel, groups=channels, bias=config.use_conv_bias)
        self.dt_bias = nn.Parameter(torch.ones(config.num_heads))
        self.A_log = nn.Parameter(torch.zeros(config.num_heads))
        self.D = nn.Parameter(torch.ones(config.num_heads))
        # Each group by itself, as mamba_ssm (which trained the models), Megatron and transformers from 5.23 on do;
        # earlier releases take the norm over all groups.
        self.norm = GatedRMSNorm(
            config.inner_size, eps=config.layer_norm_epsilon, norm_before_gate=False, num_groups=config.n_groups
        )
        self.out_proj = nn.Linear(config.inner_size, config.hidden_size, bias=config.use_bias)

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
        heads = self.heads
        inner, grouped = heads.values * heads.value_dim, heads.keys * heads.key_dim
        z, xbc, dt = self.in_proj(x).split([inner, inner + 2 * grouped, heads.values], dim=-1)
        state, memory = sequences.split(state)
        recurrent, tail = state if state else (None, None)
        xbc, new_tail = convolve_sequences(
            xbc,
            self.conv1d.weight,
            self.conv1d.bias,
            tail=tail,
            cu_seqlens=sequences.cu_seqlens,
            seq_idx=sequences.seq_idx,
            output_tail=sequences.output_states,
            context=sequences.context,
            silu=True,
        )
        inputs, B, C = xbc.split([inner, grouped, grouped], dim=-1)
        inputs = inputs.unflatten(-1, (heads.values, -1))
        B, C = (y.unflatten(-1, (heads.keys, -1)) for y in (B, C))
        # The dynamics stay fp32 in bf16 training: a rounded decay is a different memory.
        wide = wide_dtype(x.dtype)
        dt = F.softplus(dt.to(wide) + self.dt_bias.to(wide)).clamp(*self.config.time_step_limit)
        A = -self.A_log.to(wide).exp()
        if sequences.mitigation is None:
            y, recurrent = _scan(sequences, (inputs, dt, A, B, C), recurrent, self.D)
        else:
            y, recurrent, memory = mitigated_ssd(
                sequences.mitigation, partial(_scan, sequences), (inputs, dt, A, B, C), recurrent, memory
            )
            # What is inserted into the state may be less than the input; what passes it by is not.
            y = y + inputs * self.D.to(inputs.dtype).unsqueeze(-1)
        y = self.norm(y.to(x.dtype).flatten(-2), z)
        if not sequences.output_states:
            return self.out_proj(y), None
        assert recurrent is not None
        assert new_tail is not None
        return self.out_proj(y), (recurrent, new_tail, *memory)


def _scan(
    sequences: Sequences,
    inputs: tuple[torch.Tensor, ...],
    state: torch.Tensor | None,
    skip: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run :func:`statex_dist.ops.ssd.ssd` over a segment, or its step where the segment is one token.

    Args:
        sequences: Borders of packed sequences and the scan's backend.
        inputs: ``x, dt, A, B, C``.
        state: The recurrent state before the segment, or None for zero.
        skip: ``[H]`` skip weights ``D``, or None.
    """
    x, dt, A, B, C = inputs
    if x.shape[1] == 1 and state is not None and sequences.cu_seqlens is None:
        x, dt, B, C = (y.squeeze(1) for y in (x, dt, B, C))
        y, state = ssd_decode(x, dt, A, B, C, state, D=skip, overwrite=sequences.overwrites)
        return y.unsqueeze(1), state
    return ssd(
        x,
        dt,
        A,
        B,
        C,
        D=skip,
        initial_state=state,
        cu_seqlens=sequences.cu_seqlens,
        seq_idx=sequences.seq_idx,
        output_final_state=sequences.scan_returns_state,
        backend=sequences.scan_backend,  # type: ignore[arg-type]
        chunk_size=sequences.chunk_size,
        context=sequences.context,
    )


class Block(nn.Module):
    """One pre-norm Mamba2 layer."""

    def __init__(self, config: Mamba2Config, layer: int):
        super().__init__()
        self.residual_in_fp32 = config.residual_in_fp32
        self.norm = RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mixer = Mamba2Mixer(config, layer)

    def forward(
        self, x: torch.Tensor, sequences: Sequences, state: LayerState | None = None
    ) -> tuple[torch.Tensor, LayerState | None]:
        """Return the layer's output ``[B, T, hidden]`` and its state after ``x``."""
        mixed, new_state = self.mixer(self.norm(x.to(self.norm.weight.dtype)), sequences, state)
        residual = x.to(wide_dtype(x.dtype)) if self.residual_in_fp32 else x
        return residual + mixed, new_state
