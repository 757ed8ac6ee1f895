"""Layers around the token mixing: norms (in fp32), MLP, sparse experts, flash-linear-attention's pre-norm block.

Norms, gates and SwiGLU are one kernel each on a GPU. In PyTorch each is a chain of operators, and autograd keeps the
wide intermediates of all of them. The kernels of flash-linear-attention keep only what they are given. Bytes kept for
the backward pass, per token, in bf16, for a norm over ``D`` channels and an MLP of ``I``:

============================  ========  =======
piece                         PyTorch   kernel
============================  ========  =======
RMS norm                      6 D + 4   2 D + 4
RMS norm, then SiLU gate      20 D + 4  4 D + 4
RMS norm, then sigmoid gate   16 D + 4  4 D + 4
SiLU gate, then RMS norm      18 D + 4  4 D + 4
SwiGLU and the product of it  8 I       6 I
============================  ========  =======

Kernels compute in fp32 and round once; the PyTorch norms round before the weight as well. float64, tensors on a CPU and
rows above 64 KiB stay with PyTorch. The kernels' offsets have 64 bits, so no length is too long for them.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from statex_dist.models.core.sequences import LayerState, Sequences
from statex_dist.ops import backends
from statex_dist.ops.fla_api import fla_gated_rms_norm, fla_rms_norm, fla_swiglu, has_fla

_ROW_BYTES = 65536
"""The norms' kernels hold a whole row at once and raise above this."""


def takes_kernels(x: torch.Tensor) -> bool:
    """Return whether flash-linear-attention's kernels are to run on ``x``."""
    return x.is_cuda and x.numel() > 0 and backends.takes_kernels(x, has_fla)


def _row_fits(x: torch.Tensor) -> bool:
    return x.shape[-1] * x.element_size() <= _ROW_BYTES


def _widened(x: torch.Tensor) -> torch.Tensor:
    """Return ``x`` in fp32 (float64 for float64)."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _normalized(x: torch.Tensor, num_groups: int, eps: float) -> torch.Tensor:
    """Return ``x`` over the root mean square of each group of channels, in fp32 (float64 for float64)."""
    if num_groups > 1:
        return _normalized(x.unflatten(-1, (num_groups, -1)), 1, eps).flatten(-2)
    x = _widened(x)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, *, eps: float) -> torch.Tensor:
    """Return the RMS norm (arXiv 1910.07467) over the last dimension.

    Args:
        x: ``[..., D]``.
        weight: ``[D]``, of any floating dtype.
        eps: Added to the mean square.

    Returns:
        ``[..., D]`` in ``x``'s dtype.
    """
    if takes_kernels(x) and _row_fits(x):
        return fla_rms_norm(x, weight, eps=eps)
    return (weight * _normalized(x, 1, eps).to(x.dtype)).to(x.dtype)


def gated_rms_norm(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    *,
    eps: float,
    norm_before_gate: bool,
    sigmoid: bool = False,
    num_groups: int = 1,
) -> torch.Tensor:
    """Return an RMS norm with a gate, ``silu(gate)`` or ``sigmoid(gate)``.

    Args:
        x: ``[..., D]``.
        gate: ``[..., D]``.
        weight: ``[D]``.
        eps: Added to the mean square.
        norm_before_gate: Whether the norm is gated (GLA), or the gated is normed (Mamba2; has no kernel for a sigmoid).
        sigmoid: The gate's activation, in place of SiLU.
        num_groups: Groups of channels that are normed each by itself, as mamba_ssm does (more than one have no kernel).

    Returns:
        ``[..., D]`` in ``x``'s dtype.
    """
    if num_groups == 1 and takes_kernels(x) and _row_fits(x) and (norm_before_gate or not sigmoid):
        return fla_gated_rms_norm(x, gate, weight, eps=eps, norm_before_gate=norm_before_gate, sigmoid=sigmoid)
    gate = torch.sigmoid(_widened(gate)) if sigmoid else F.silu(_widened(gate))
    if norm_before_gate:
        return (weight * _normalized(x, num_groups, eps) * gate).to(x.dtype)
    return (weight * _normalized(x.to(gate.dtype) * gate, num_groups, eps).to(x.dtype)).to(x.dtype)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return ``silu(gate) * up`` (arXiv 2002.05202), all ``[..., I]``."""
    return fla_swiglu(gate, up) if takes_kernels(gate) else F.silu(gate) * up


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension (arXiv 1910.07467)."""

    def __init__(self, size: int, *, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x / rms(x) * weight`` in ``x``'s dtype."""
        return rms_norm(x, self.weight, eps=self.eps)


class GatedRMSNorm(RMSNorm):
    """RMS norm with a gate (SiLU or sigmoid), after the norm (GLA) or before it (Mamba2), of groups of channels."""

    def __init__(self, size: int, *, eps: float, norm_before_gate: bool, sigmoid: bool = False, num_groups: int = 1):
        super().__init__(size, eps=eps)
        self.norm_before_gate = norm_before_gate
        self.sigmoid = sigmoid
        self.num_groups = num_groups

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Return the gated norm of ``x`` in ``x``'s dtype."""
        return gated_rms_norm(
            x,
            gate,
            self.weight,
            eps=self.eps,
            norm_before_gate=self.norm_before_gate,
            sigmoid=self.sigmoid,
            num_groups=self.num_groups,
        )


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
    """One pre-norm layer of flash-linear-attention's models; a family names its token mixing in ``mixing``."""

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


class Expert(nn.Module):
    """One SwiGLU expert."""

    def __init__(self, hidden_size: int, inner_size: int):
        super().__init__()
        self.w1 = nn.Linear(hidden_size, inner_size, bias=False)
        self.w2 = nn.Linear(inner_size, hidden_size, bias=False)
        self.w3 = nn.Linear(hidden_size, inner_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``w2(silu(w1(x)) * w3(x))``."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class SparseExperts(nn.Module):
    """The best ``chosen`` of ``num_experts`` experts of each token, weighted by their softmax shares."""

    def __init__(self, hidden_size: int, inner_size: int, *, num_experts: int, chosen: int):
        super().__init__()
        self.chosen = chosen
        self.gate = nn.Linear(hidden_size, num_experts, bias=False)
        self.experts = nn.ModuleList(Expert(hidden_size, inner_size) for _ in range(num_experts))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``[B, T, hidden]``."""
        tokens = x.flatten(0, 1)
        logits = self.gate(tokens)
        shares = _widened(logits).softmax(-1)
        weights, experts = shares.topk(self.chosen, dim=-1)
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        out = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            rows, place = (experts == index).nonzero(as_tuple=True)
            out = out.index_add(0, rows, expert(tokens[rows]) * weights[rows, place].unsqueeze(-1))
        return out.view_as(x)
