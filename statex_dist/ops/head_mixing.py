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


# The same on chunks with heads first (``[H, n, ., .]``), where the sums inside a chunk are folded into its matrix of
# scores. Without a mixing matrix every function returns its argument.


def spread(x: torch.Tensor, mix: torch.Tensor | None) -> torch.Tensor:
    """Return ``[H, ..., r V]``: beside the values of head ``i`` those of heads ``i + 1, ..., i + r - 1``."""
    return x if mix is None else spread_values(x, mix.shape[1], head_dim=0)


def weigh_blocks(x: torch.Tensor, mix: torch.Tensor | None) -> torch.Tensor:
    """Return ``x [H, n, C, r V]`` with block ``s`` of head ``i`` times ``mix[i, s]``."""
    if mix is None:
        return x
    return (x.unflatten(-1, (mix.shape[1], -1)) * mix.to(x.dtype)[:, None, None, :, None]).flatten(-2)


def gather_blocks(x: torch.Tensor, mix: torch.Tensor | None) -> torch.Tensor:
    """Return ``[H, n, C, V]``, the sum of each head's parts: the transpose of :func:`spread`."""
    return x if mix is None else sum_over_partners(x.chunk(mix.shape[1], dim=-1), head_dim=0)


def mix_blocks(x: torch.Tensor, mix: torch.Tensor | None) -> torch.Tensor:
    """Return ``[H, n, C, V]``: what the output heads read of ``x [H, n, C, r V]``."""
    return gather_blocks(weigh_blocks(x, mix), mix)


def mix_scores(scores: torch.Tensor, mix: torch.Tensor | None) -> torch.Tensor:
    """Return each output head's ``C x C`` matrix, the weighted sum of those of the key heads it reads."""
    if mix is None:
        return scores
    return sum_over_partners((scores * weight for weight in _weights(mix, scores.dtype)), head_dim=0)


def unmix_scores(
    grad: torch.Tensor, scores: torch.Tensor, mix: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the gradients of ``scores`` and of ``mix`` from that of :func:`mix_scores`."""
    if mix is None:
        return grad, None
    wide = torch.promote_types(scores.dtype, torch.float32)
    total, dmix = torch.zeros_like(grad), []
    for part, weight in zip(partner_values(grad, mix.shape[1], head_dim=0), _weights(mix, scores.dtype), strict=True):
        total.addcmul_(part, weight)
        dmix.append((scores.to(wide) * part).sum((1, 2, 3)))
    return total, torch.stack(dmix, dim=1)


def _weights(mix: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return mix.to(dtype)[:, :, None, None, None].unbind(1)
