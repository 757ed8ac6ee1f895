"""The mixing matrix M: every key head stores the values of ``r`` heads and reads them with learned weights.

The decay of a GLA state acts on its key side only, so value columns are independent: a head may carry other heads'
values beside its own, ``S_is <- diag(a_i) S_is + k_i v_{i+s}^T`` (head indices modulo H), and output head ``j`` reads
``o_j = sum_s M[j-s, s] q_{j-s} S_{j-s, s}``. ``M = [1, 0, ..., 0]`` is the original layer; a constant M over all heads
is StateX's head merge. Seen from the scan, only the value dimension grows from ``V`` to ``r V``: any kernel serves.
"""

from __future__ import annotations

import torch


def partner_values(v: torch.Tensor, num_partners: int) -> list[torch.Tensor]:
    """Return ``r`` tensors like ``v [..., H, V]``: in the ``s``-th, head ``i`` has the values of head ``i + s``."""
    return [v, *(v.roll(-s, dims=-2) for s in range(1, num_partners))]


def spread_values(v: torch.Tensor, num_partners: int) -> torch.Tensor:
    """Return ``[..., H, r V]`` from ``v [..., H, V]``: head ``i`` gets the values of heads ``i, i+1, ..., i+r-1``."""
    return torch.cat(partner_values(v, num_partners), dim=-1)


def mix_outputs(o: torch.Tensor, mix: torch.Tensor) -> torch.Tensor:
    """Return ``[..., H, V]`` from a scan's outputs ``o [..., H, r V]``, read with ``mix [H, r]``."""
    num_partners = mix.shape[1]
    parts = o.unflatten(-1, (num_partners, -1)) * mix.to(o.dtype).unsqueeze(-1)
    mixed = parts[..., 0, :]
    for s in range(1, num_partners):
        mixed = mixed + parts[..., s, :].roll(s, dims=-2)
    return mixed
