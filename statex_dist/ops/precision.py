"""Computations in at least fp32, in PyTorch: the rule for the dtype, and decays inside a chunk.

The textbook form of a chunk's decays multiplies ``q e^b`` by ``k e^{-b}``, which overflows in fp32 once they sum below
-88. No exponent is ever positive here, whatever the gates are.
"""

from __future__ import annotations

import torch

SMALLEST_BLOCK = 4
"""Rows of the blocks on the diagonal of :func:`decayed_products`."""


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of decays, states, norms and losses: fp32 for a narrower one, a wider one (float64) as it is."""
    return torch.promote_types(dtype, torch.float32)


def reverse_cumsum(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Return, for every place along a dimension, the sum from there to the end."""
    return x.flip(dim).cumsum(dim=dim).flip(dim)


def causal_decay(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Return ``exp(b_t - b_u)`` for ``u <= t``, else 0, ``[..., C, C]``.

    Args:
        rows: ``[..., C, 1]`` cumulative log decays ``b``.
        columns: The same, ``[..., 1, C]``.
    """
    difference = rows - columns
    later = torch.ones(difference.shape[-2:], dtype=torch.bool, device=difference.device).triu(1)
    return difference.masked_fill(later, -torch.inf).exp()


def decayed_products(q: torch.Tensor, k: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the causal ``A[t, u] = sum_c q_tc k_uc exp(b_tc - b_uc)`` of chunks, ``[..., C, C]``.

    With a decay per channel it is built by halving: each off-diagonal block refers both sides to the border between
    its halves.

    Args:
        q: ``[..., C, K]``, ``C`` a power of two from 4.
        k: ``[..., C, K]``.
        b: ``[..., C, K]`` or ``[..., C, 1]`` log decays, summed so far.
    """
    if b.shape[-1] < q.shape[-1]:
        return (q @ k.transpose(-1, -2)) * causal_decay(b, b.transpose(-1, -2))
    chunk_size = q.shape[-2]
    matrix = _diagonal_blocks(q, k, b)
    size = SMALLEST_BLOCK
    while size < chunk_size:
        q_late, k_early = (x.unflatten(-2, (-1, 2, size))[..., i, :, :] for x, i in ((q, 1), (k, 0)))
        b_early, b_late = b.unflatten(-2, (-1, 2, size)).unbind(-3)
        border = b_early[..., -1:, :]
        corner = (q_late * (b_late - border).exp()) @ (k_early * (border - b_early).exp()).transpose(-1, -2)
        early, late = matrix.unflatten(-3, (-1, 2)).unbind(-3)
        top = torch.cat([early, early.new_zeros(()).expand_as(early)], dim=-1)
        matrix = torch.cat([top, torch.cat([corner, late], dim=-1)], dim=-2)
        size *= 2
    return matrix.squeeze(-3)


def _diagonal_blocks(q: torch.Tensor, k: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the causal ``[..., C / 4, 4, 4]`` blocks on the diagonal of ``A``.

    Written out entry by entry: the four diagonal entries need no exponential and the six above it nothing at all, which
    makes this twice as fast as a masked ``[..., 4, 4, K]`` tensor and its gradient.
    """
    q_rows, k_rows, b_rows = (x.unflatten(-2, (-1, SMALLEST_BLOCK)).unbind(-2) for x in (q, k, b))
    nothing = q.new_zeros(()).expand(q_rows[0].shape[:-1])
    rows = []
    for t in range(SMALLEST_BLOCK):
        decayed = [k_rows[u] * (b_rows[t] - b_rows[u]).exp() for u in range(t)]
        entries = [(q_rows[t] * key).sum(-1) for key in (*decayed, k_rows[t])]
        rows.append(torch.stack(entries + [nothing] * (SMALLEST_BLOCK - 1 - t), dim=-1))
    return torch.stack(rows, dim=-2)
