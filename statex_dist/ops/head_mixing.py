"""The mixing matrix M: every key head stores the values of ``r`` heads and reads them with learned weights.

The decay of a GLA state acts on its key side only, so value columns are independent: a head may carry other heads'
values beside its own, ``S_is <- diag(a_i) S_is + k_i v_{i+s}^T`` (head indices modulo H), and output head ``j`` reads
``o_j = sum_s M[j-s, s] q_{j-s} S_{j-s, s}``. ``M = [1, 0, ..., 0]`` is the original layer; a constant M over all heads
is StateX's head merge. Seen from the scan, only the value dimension grows from ``V`` to ``r V``: any kernel serves.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch


def partner_values(v: torch.Tensor, num_partners: int, *, head_dim: int = -2) -> list[torch.Tensor]:
    """Return ``r`` tensors like ``v [..., H, V]``: in the ``s``-th, head ``i`` has the values of head ``i + s``.

    Args:
        v: Values; any tensor that has one part per head.
        num_partners: ``r``.
        head_dim: Which dimension counts the heads.
    """
    return [v, *(v.roll(-s, dims=head_dim) for s in range(1, num_partners))]


def spread_values(v: torch.Tensor, num_partners: int, *, head_dim: int = -2) -> torch.Tensor:
    """Return ``[..., H, r V]`` from ``v [..., H, V]``: head ``i`` gets the values of heads ``i, i+1, ..., i+r-1``."""
    return torch.cat(partner_values(v, num_partners, head_dim=head_dim), dim=-1)


def sum_over_partners(parts: Iterable[torch.Tensor], *, head_dim: int = -2) -> torch.Tensor:
    """Return what is meant for each head, of the ``s``-th part that of head ``i`` for head ``i + s``.

    The transpose of :func:`partner_values`.
    """
    total, *others = parts
    for s, part in enumerate(others, start=1):
        total = total + part.roll(s, dims=head_dim)
    return total


def mix_outputs(o: torch.Tensor, mix: torch.Tensor) -> torch.Tensor:
    """Return ``[..., H, V]`` from a scan's outputs ``o [..., H, r V]``, read with ``mix [H, r]``."""
    parts = o.unflatten(-1, (mix.shape[1], -1)) * mix.to(o.dtype).unsqueeze(-1)
    return sum_over_partners(parts.unbind(-2))
