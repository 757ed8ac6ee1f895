"""Cutting a sequence into chunks: a scan costs no more than a constant amount of memory beyond its inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

CHUNK_TOKENS = 64
"""Tokens whose products are taken at once; a power of two from 4."""
SPAN_TOKENS = 4096
"""Tokens whose chunks are held at once."""


def scan_spans(
    scan: Callable[..., tuple[torch.Tensor, torch.Tensor]], inputs: Sequence[torch.Tensor], state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run ``scan(*inputs, state)`` over one span of tokens after the other; return its outputs and the last state."""
    outputs = []
    for pieces in zip(*(x.split(SPAN_TOKENS, dim=1) for x in inputs), strict=True):
        output, state = scan(*pieces, state)
        outputs.append(output)
    return torch.cat(outputs, dim=1), state


def to_chunks(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return ``[B, H, N, C, D]`` from ``x [B, T, H, D]``; what fills the last chunk is zero."""
    size = 4
    while size < min(x.shape[1], CHUNK_TOKENS):
        size *= 2
    x = F.pad(x.to(dtype), (0, 0, 0, 0, 0, -x.shape[1] % size))
    return x.unflatten(1, (-1, size)).permute(0, 3, 1, 2, 4)


def from_chunks(x: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Return ``[B, T, H, D]`` from ``x [B, H, N, C, D]``."""
    return x.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :num_tokens]
