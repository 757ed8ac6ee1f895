"""Mixed heads: each head also stores the values of others, and a matrix reads them (one column per partner)."""

from __future__ import annotations

import torch
from torch import nn


def spread_values(v: torch.Tensor, num_partners: int) -> torch.Tensor:
    """Return ``[..., H, r V]`` from ``v [..., H, V]``: head ``i`` gets the values of heads ``i, i+1, ..., i+r-1``."""
    return torch.cat([v.roll(-s, dims=-2) for s in range(num_partners)], dim=-1)


def mix_outputs(o: torch.Tensor, mix: torch.Tensor) -> torch.Tensor:
    """Return ``[..., H, V]`` from ``o [..., H, r V]``, read with ``mix [H, r]``: the transpose of the spreading."""
    parts = o.unflatten(-1, (mix.shape[1], -1)) * mix.to(o.dtype).unsqueeze(-1)
    total, *others = parts.unbind(-2)
    for s, part in enumerate(others, start=1):
        total = total + part.roll(s, dims=-2)
    return total


def add_mix(module: nn.Module, num_heads: int, num_partners: int) -> None:
    """Give a module its mixing matrix ``mix``, or None where heads are not mixed."""
    module.register_parameter("mix", nn.Parameter(torch.ones(num_heads, num_partners)) if num_partners > 1 else None)
