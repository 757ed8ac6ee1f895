"""Norms with and without a gate, and SwiGLU, in PyTorch; :mod:`statex_dist.ops.fused` puts kernels in their place.

They are computed in fp32 (float64 for float64).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from statex_dist.ops.precision import wide_dtype


def normalize(x: torch.Tensor, eps: float) -> torch.Tensor:
    """Return ``x`` over its root mean square along the last dimension, in fp32 (float64 for float64)."""
    x = x.to(wide_dtype(x.dtype))
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def normalize_groups(x: torch.Tensor, num_groups: int, eps: float) -> torch.Tensor:
    """Return :func:`normalize` of each of so many groups of channels by itself."""
    return normalize(x, eps) if num_groups == 1 else normalize(x.unflatten(-1, (num_groups, -1)), eps).flatten(-2)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, *, eps: float) -> torch.Tensor:
    """Return the RMS norm of :func:`statex_dist.ops.fused.rms_norm`."""
    return (weight * normalize(x, eps).to(x.dtype)).to(x.dtype)


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
    """Return the gated RMS norm of :func:`statex_dist.ops.fused.gated_rms_norm`."""
    activation = torch.sigmoid if sigmoid else F.silu
    gate = activation(gate.to(wide_dtype(gate.dtype)))
    if norm_before_gate:
        return (weight * normalize_groups(x, num_groups, eps) * gate).to(x.dtype)
    return (weight * normalize_groups(x.to(gate.dtype) * gate, num_groups, eps).to(x.dtype)).to(x.dtype)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return ``silu(gate) * up``, all ``[..., I]``."""
    return F.silu(gate) * up
