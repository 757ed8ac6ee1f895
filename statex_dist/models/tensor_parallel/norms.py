"""Output norms of which a rank has some of the channels: the ranks add up their sums of squares.

A norm over the local channels alone would raise no error and compute another model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from statex_dist.models.core.layers import GatedRMSNorm, RMSNorm
from statex_dist.models.tensor_parallel.share import TensorShare


class SplitRMSNorm(RMSNorm):
    """Root-mean-square norm over channels of several ranks.

    Args:
        whole: The norm over all of them.
        held: Channels that are here.
        share: The ranks that have the others.
    """

    def __init__(self, whole: RMSNorm, held: int, share: TensorShare):
        super().__init__(held, eps=whole.eps)
        self.size, self.share, self.num_groups = whole.weight.numel(), share, 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x [..., held] / rms * weight`` in ``x``'s dtype, the root mean square being that of all channels."""
        return (self.weight * _normalize(x, self).to(x.dtype)).to(x.dtype)


class SplitGatedRMSNorm(GatedRMSNorm):
    """Gated norm over channels of several ranks; arguments as for :class:`SplitRMSNorm`, ``share`` those of a group."""

    def __init__(self, whole: GatedRMSNorm, held: int, share: TensorShare):
        super().__init__(held, eps=whole.eps, norm_before_gate=whole.norm_before_gate, sigmoid=whole.sigmoid)
        # Groups that are here whole, or the one that is here in part.
        self.size, self.share = whole.weight.numel() // whole.num_groups, share
        self.num_groups = max(held // self.size, 1)

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Return the gated norm of ``x [..., held]`` in ``x``'s dtype."""
        activation = torch.sigmoid if self.sigmoid else F.silu
        gate = activation(gate.to(torch.promote_types(gate.dtype, torch.float32)))
        if self.norm_before_gate:
            return (self.weight * _normalize(x, self) * gate).to(x.dtype)
        return (self.weight * _normalize(x.to(gate.dtype) * gate, self).to(x.dtype)).to(x.dtype)


def _normalize(x: torch.Tensor, norm: SplitRMSNorm | SplitGatedRMSNorm) -> torch.Tensor:
    """Return ``x`` over the root mean square of all channels of a group, in fp32 (float64 for float64)."""
    groups = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (norm.num_groups, -1))
    mean = norm.share.all_reduce(groups.square().sum(-1, keepdim=True)) / norm.size
    return (groups * torch.rsqrt(mean + norm.eps)).flatten(-2)
