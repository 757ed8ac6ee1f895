"""The gated norm."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .layers import RMSNorm, normalize, wide


class GatedRMSNorm(RMSNorm):
    """RMS norm with a gate, which comes after the norm or (Mamba2, by groups of channels) before it."""

    def __init__(
        self, size: int, eps: float, *, norm_before_gate: bool = True, sigmoid: bool = False, num_groups: int = 1
    ):
        super().__init__(size, eps)
        self.num_groups = num_groups
        self.norm_before_gate = norm_before_gate
        self.activation = torch.sigmoid if sigmoid else F.silu

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Return the gated norm of ``x [..., size]`` in its dtype."""
        gate = self.activation(wide(gate))
        if self.norm_before_gate:
            return (self.weight * normalize(x, self.eps) * gate).to(x.dtype)
        groups = (wide(x) * gate).unflatten(-1, (self.num_groups, -1))
        return (self.weight * normalize(groups, self.eps).flatten(-2).to(x.dtype)).to(x.dtype)
