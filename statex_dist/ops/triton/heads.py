"""The mixing matrix on chunks with heads first (``[H, n, ., .]``): what key heads store, and what output heads read.

As :mod:`statex_dist.ops.head_mixing`, with the sums inside a chunk folded into its matrix of scores. Without a mixing
matrix every function returns its argument.
"""

from __future__ import annotations

import torch

from statex_dist.ops.head_mixing import partner_values, spread_values, sum_over_partners
from statex_dist.ops.precision import wide_dtype


def spread(x: torch.Tensor, mix: torch.Tensor | None) -> torch.Tensor:
    """Return ``[H, ..., r V]``: beside the values of head ``i`` those of heads ``i + 1, ..., i + r - 1``."""
    return x if mix is None else spread_values(x, mix.shape[1], head_dim=0)


def weigh_blocks(x: torch.Tensor, mix: torch.Tensor | None) -> torch.Tensor:
    """Return ``x [H, n, C, r V]`` with block ``s`` of head ``i`` times ``mix[i, s]``."""
    if mix is None:
        return x
    return (x.unflatten(-1, (mix.shape[1], -1)) * mix.to(x.dtype)[:, None, None, :, None]).flatten(-2)


def gather_blocks(x: torch.Tensor, mix: torch.Tensor | None) -> torch.Tensor:
    """Return ``[H, n, C, V]``, the sum of what is meant for each head: the transpose of :func:`spread`."""
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
    wide = wide_dtype(scores.dtype)
    total, dmix = torch.zeros_like(grad), []
    for part, weight in zip(partner_values(grad, mix.shape[1], head_dim=0), _weights(mix, scores.dtype), strict=True):
        total.addcmul_(part, weight)
        dmix.append((scores.to(wide) * part).sum((1, 2, 3)))
    return total, torch.stack(dmix, dim=1)


def _weights(mix: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return mix.to(dtype)[:, :, None, None, None].unbind(1)
