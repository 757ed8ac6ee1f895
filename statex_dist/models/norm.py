"""RMS norm, plain and gated, computed in fp32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from statex_dist.ops.precision import wide_dtype


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension (arXiv 1910.07467)."""

    def __init__(self, size: int, *, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x / rms(x) * weight`` in ``x``'s dtype."""
        return self.weight * normalize(x, self.eps).to(x.dtype)


class GatedRMSNorm(RMSNorm):
    """RMS norm with a gate (SiLU or sigmoid), after the norm (GLA) or before it (Mamba2)."""

    def __init__(self, size: int, *, eps: float, norm_before_gate: bool, sigmoid: bool = False):
        super().__init__(size, eps=eps)
        self.norm_before_gate = norm_before_gate
        self.activation = torch.sigmoid if sigmoid else F.silu

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Return the gated norm of ``x`` in ``x``'s dtype."""
        gate = self.activation(gate.to(wide_dtype(gate.dtype)))
        if self.norm_before_gate:
            return (self.weight * normalize(x, self.eps) * gate).to(x.dtype)
        return self.weight * normalize(x.to(gate.dtype) * gate, self.eps).to(x.dtype)


def normalize(x: torch.Tensor, eps: float) -> torch.Tensor:
    """Return ``x`` over its root mean square along the last dimension, in fp32 (float64 for float64)."""
    x = x.to(wide_dtype(x.dtype))
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
