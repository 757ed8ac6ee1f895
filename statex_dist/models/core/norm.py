"""RMS norm, plain and gated, computed in fp32."""

from __future__ import annotations

import torch
from torch import nn

from statex_dist.ops.fused import gated_rms_norm, rms_norm


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
