"""Norms and padding."""

from __future__ import annotations

import torch
from torch import nn


def wide(x: torch.Tensor) -> torch.Tensor:
    """Return ``x`` in at least fp32: decays, states and norms are never computed in less."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def normalize(x: torch.Tensor, eps: float) -> torch.Tensor:
    """Return ``x`` over its root mean square along the last dimension, in a wide dtype."""
    x = wide(x)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the norm of ``x [..., size]`` in its dtype."""
        return (self.weight * normalize(x, self.eps).to(x.dtype)).to(x.dtype)


def mask_padding(x: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
    """Return ``x [B, T, D]`` with zeros where ``keep [B, T]`` is false."""
    return x if keep is None else x.masked_fill(~keep.unsqueeze(-1), 0)
