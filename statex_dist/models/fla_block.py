"""Modules that flash-linear-attention's families share: block, MLP, short convolutions, mixing matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from statex_dist.models.layout import HeldHeads
from statex_dist.models.mitigated import mitigated_gla
from statex_dist.models.mixed_head_tp import PartnerHeads
from statex_dist.models.norm import RMSNorm
from statex_dist.models.sequence import LayerState, Sequences
from statex_dist.ops.conv import convolve_sequences
from statex_dist.ops.fused import swiglu
from statex_dist.ops.gla import gla, gla_decode
from statex_dist.ops.precision import wide_dtype
from statex_dist.state.geometry import StateGeometry


class MLP(nn.Module):
    """SwiGLU channel mixing (arXiv 2002.05202).

    On a GPU three of its tensors ``[B, T, inner]`` are kept for the backward pass (``gate``, ``up`` and their product),
    of PyTorch's operators four.
    """

    def __init__(self, hidden_size: int, inner_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, inner_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, inner_size, bias=False)
        self.down_proj = nn.Linear(inner_size, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``down(silu(gate(x)) * up(x))``."""
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class FLABlock(nn.Module):
    """One pre-norm layer; a family names its token mixing in ``mixing``."""

    mixing: ClassVar[type[nn.Module]]

    def __init__(self, config: Any, layer: int):
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attn = self.mixing(config, layer)
        self.mlp_norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = MLP(config.hidden_size, config.mlp_size)

    def forward(
        self, x: torch.Tensor, sequences: Sequences, state: LayerState | None = None, *shared: torch.Tensor | None
    ) -> tuple[torch.Tensor, LayerState | None]:
        """Return the layer's output ``[B, T, hidden]`` and its state after ``x``; ``shared`` goes to the mixing."""
        mixed, new_state = self.attn(self.attn_norm(x), sequences, state, *shared)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), new_state


def add_convolutions(module: nn.Module, channels: dict[str, int], kernel_size: int) -> None:
    """Give a module one depthwise convolution ``<name>_conv1d`` per entry of ``channels``."""
    for name, count in channels.items():
        module.add_module(f"{name}_conv1d", nn.Conv1d(count, count, kernel_size, groups=count, bias=False))


def convolve(
    module: nn.Module,
    names: str,
    inputs: Sequence[torch.Tensor],
    sequences: Sequences,
    tail: torch.Tensor | None,
    *,
    activation: bool = True,
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """Convolve several inputs, as one tensor: a depthwise convolution does not mix channels.

    Args:
        module: Has the convolutions of :func:`add_convolutions`.
        names: One letter per input, in order.
        inputs: ``[B, T, D]`` each.
        sequences: Borders of packed sequences and what to return.
        tail: The convolutions' state before the inputs, or None for zero.
        activation: Whether a SiLU follows.

    Returns:
        The outputs, and the convolutions' state after the inputs (nothing unless asked for).
    """
    weights = [module.get_submodule(f"{name}_conv1d").weight for name in names]
    joined, weight = torch.cat(list(inputs), dim=-1), torch.cat(weights)  # type: ignore[arg-type]
    out, new_tail = convolve_sequences(
        joined,
        weight,
        tail=tail,
        cu_seqlens=sequences.cu_seqlens,
        seq_idx=sequences.seq_idx,
        output_tail=sequences.output_states,
        context=sequences.context,
        silu=activation,
    )
    return out.split([y.shape[-1] for y in inputs], dim=-1), (() if new_tail is None else (new_tail,))


def add_mix(module: nn.Module, geometry: StateGeometry) -> None:
    """Give a module the mixing matrix ``mix`` that its geometry asks for, or None."""
    if geometry.values_per_key > 1:
        module.mix = nn.Parameter(torch.zeros(geometry.num_heads, geometry.values_per_key))
    else:
        module.register_parameter("mix", None)


def linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    recurrent: torch.Tensor | None,
    sequences: Sequences,
    *,
    heads: HeldHeads,
    scale: float | None = None,
    mix: torch.Tensor | None = None,
    memory: LayerState = (),
) -> tuple[torch.Tensor, torch.Tensor | None, LayerState]:
    """Run :func:`statex_dist.ops.gla.gla` over a segment, or its step where the segment is one token.

    Args:
        q: ``[B, T, H, K]`` queries.
        k: ``[B, T, H, K]`` keys.
        v: ``[B, T, H, V]`` values.
        g: ``[B, T, H, K]`` log decays.
        recurrent: The state before the segment, or None for zero.
        sequences: Borders of packed sequences and the scan's backend.
        heads: What of the layer is here.
        scale: Factor of the queries, ``K ** -0.5`` where None.
        mix: ``[H, r]`` mixing matrix, or None.
        memory: What the sequences' mitigation had added to the layer's state.

    Returns:
        Output ``[B, T, H, V]``, and the state and the mitigation's memory after the segment (None and nothing unless
        the sequences ask for states).
    """
    mitigation = sequences.mitigation
    pairs, scan_mix = PartnerHeads.where_needed(heads), mix
    if pairs is not None:
        q, k, g = (pairs.by_key(y) for y in (q, k, g))
        v, scan_mix = pairs.by_value(v), None

    def scan(inputs: LayerState, before: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        q, k, v, g = inputs
        if q.shape[1] == 1 and before is not None and sequences.cu_seqlens is None:
            q, k, v, g = (y.squeeze(1) for y in inputs)
            o, after = gla_decode(q, k, v, g, before, scale=scale, mix=scan_mix, overwrite=sequences.overwrites)
            return o.unsqueeze(1), after
        return gla(
            q,
            k,
            v,
            g.to(wide_dtype(q.dtype)),
            scale=scale,
            mix=scan_mix,
            initial_state=before,
            cu_seqlens=sequences.cu_seqlens,
            backend=sequences.scan_backend,  # type: ignore[arg-type]
            chunk_size=sequences.chunk_size,
            max_state_bytes=sequences.max_state_bytes,
            output_final_state=sequences.scan_returns_state,
            context=sequences.context,
        )

    if mitigation is None:
        o, after = scan((q, k, v, g), recurrent)
    else:
        o, after, memory = mitigated_gla(mitigation, scan, (q, k, v, g), recurrent, memory)
    if pairs is not None:
        assert mix is not None
        o = pairs.read(o, mix)
    return (o, after, memory) if sequences.output_states else (o, None, ())
