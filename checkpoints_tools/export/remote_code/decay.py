"""Decay between the tokens of a chunk."""

from __future__ import annotations

import torch


def causal_decay(b: torch.Tensor) -> torch.Tensor:
    """Return ``exp(b_t - b_u)`` for ``u <= t``, else 0: ``[..., C, C]`` from cumulative log decays ``b [..., C]``."""
    later = torch.ones(b.shape[-1], b.shape[-1], dtype=torch.bool, device=b.device).triu(1)
    return (b.unsqueeze(-1) - b.unsqueeze(-2)).masked_fill(later, -torch.inf).exp()
