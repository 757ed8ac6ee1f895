"""The mixing matrix on chunks with heads first (``[H, n, ., .]``): what key heads store, and what output heads read.

As :mod:`statex_dist.ops.mixing`, with the sums inside a chunk folded into its matrix of scores. Without a mixing matrix
every function returns its argument.
"""

from __future__ import annotations

import torch

from statex_dist.ops.precision import wide_dtype


def spread(x: torch.Tensor, mix: torch.Tensor | None) -> torch.Tensor:
    """Return ``[H, ..., r V]``: beside the values of head ``i`` those of heads ``i + 1, ..., i + r - 1``."""
    if mix is None:
        return x
    return torch.cat([x.roll(-s, dims=0) for s in range(mix.shape[1])], dim=-1)


def weigh_blocks(x: torch.Tensor, mix: torch.Tensor | None) -> torch.Tensor:
    """Return ``x [H, n, C, r V]`` with block ``s`` of head ``i`` times ``mix[i, s]``."""
    if mix is None:
        return x
    return (x.unflatten(-1, (mix.shape[1], -1)) * mix.to(x.dtype)[:, None, None, :, None]).flatten(-2)


def gather_blocks(x: torch.Tensor, mix: torch.Tensor | None) -> torch.Tensor:
    """Return ``[H, n, C, V]``, the sum of what is meant for each head: the transpose of :func:`spread`."""
    if mix is None:
        return x
    return sum(block.roll(s, dims=0) for s, block in enumerate(x.chunk(mix.shape[1], dim=-1)))  # type: ignore[return-value]


def mix_blocks(x: torch.Tensor, mix: torch.Tensor | None) -> torch.Tensor:
    """Return ``[H, n, C, V]``: what the output heads read of ``x [H, n, C, r V]``."""
    return gather_blocks(weigh_blocks(x, mix), mix)


def mix_scores(scores: torch.Tensor, mix: torch.Tensor | None) -> torch.Tensor:
    """Return each output head's ``C x C`` matrix, the weighted sum of those of the key heads it reads."""
    if mix is None:
        return scores
    weights = mix.to(scores.dtype)[:, :, None, None, None].unbind(1)
    return sum((scores * weight).roll(s, dims=0) for s, weight in enumerate(weights))  # type: ignore[return-value]


def unmix_scores(
    grad: torch.Tensor, scores: torch.Tensor, mix: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the gradients of ``scores`` and of ``mix`` from that of :func:`mix_scores`."""
    if mix is None:
        return grad, None
    rolled = [grad.roll(-s, dims=0) for s in range(mix.shape[1])]
    weights = mix.to(scores.dtype)[:, :, None, None, None].unbind(1)
    wide = wide_dtype(scores.dtype)
    dmix = torch.stack([(scores.to(wide) * x).sum((1, 2, 3)) for x in rolled], dim=1)
    return sum(x * weight for x, weight in zip(rolled, weights, strict=True)), dmix  # type: ignore[return-value]
