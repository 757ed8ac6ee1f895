"""Products of queries and keys with a decay per key channel."""

from __future__ import annotations

import torch


def decayed_products(q: torch.Tensor, k: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return ``A[t, u] = sum_c q_tc k_uc exp(b_tc - b_uc)`` for ``u <= t``, else 0.

    The matrix is built from blocks of 4 by doubling: each block below the diagonal refers both of its sides to the
    border between them, so that no exponent is positive. (The form ``(q e^b) (k e^-b)^T`` overflows.)

    Args:
        q: ``[..., C, K]`` queries, ``C`` a power of two from 4.
        k: ``[..., C, K]`` keys.
        b: ``[..., C, K]`` cumulative log decays, falling.

    Returns:
        ``[..., C, C]``.
    """
    size = 4
    matrix = _diagonal_blocks(q, k, b)
    while size < q.shape[-2]:
        late = q.unflatten(-2, (-1, 2, size))[..., 1, :, :]
        early = k.unflatten(-2, (-1, 2, size))[..., 0, :, :]
        b_early, b_late = b.unflatten(-2, (-1, 2, size)).unbind(-3)
        border = b_early[..., -1:, :]
        corner = (late * (b_late - border).exp()) @ (early * (border - b_early).exp()).transpose(-1, -2)
        first, second = matrix.unflatten(-3, (-1, 2)).unbind(-3)
        top = torch.cat([first, torch.zeros_like(first)], dim=-1)
        matrix = torch.cat([top, torch.cat([corner, second], dim=-1)], dim=-2)
        size *= 2
    return matrix.squeeze(-3)


def _diagonal_blocks(q: torch.Tensor, k: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the ``[..., C / 4, 4, 4]`` blocks on the diagonal, entry by entry."""
    q_rows, k_rows, b_rows = (x.unflatten(-2, (-1, 4)).unbind(-2) for x in (q, k, b))
    nothing = torch.zeros_like(q_rows[0][..., 0])
    rows = []
    for t in range(4):
        keys = [k_rows[u] * (b_rows[t] - b_rows[u]).exp() for u in range(t)] + [k_rows[t]]
        rows.append(torch.stack([(q_rows[t] * key).sum(-1) for key in keys] + [nothing] * (3 - t), dim=-1))
    return torch.stack(rows, dim=-2)
