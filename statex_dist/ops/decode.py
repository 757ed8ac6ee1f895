"""One token of each recurrence, written over the state before it: the form of decoding that owns its states.

Decoding is as fast as states can be read and written, so a state is never held twice, and its three passes (decay,
insert, read) are made block by block while a block lies in the cache: on a CPU, with 32 sequences of 4 MiB each, that
took a ninth of the time of three passes over all of them into new memory (the states of :mod:`statex_dist.ops.naive`,
which stay as they are and may have a gradient). On a GPU all blocks are one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

_BLOCK_BYTES = 1 << 20
"""Of a state that a CPU works on at a time: about half of a core's second-level cache."""


def _blocks(state: torch.Tensor) -> Iterator[slice]:
    """Yield ranges of the first dimension."""
    count, size = len(state), len(state)
    if not state.is_cuda:
        size = max(1, _BLOCK_BYTES // max(1, state[:1].numel() * state.element_size()))
    yield from (slice(start, start + size) for start in range(0, count, size))


def gla_step_(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, state: torch.Tensor, *, scale: float
) -> torch.Tensor:
    """Advance gated linear attention by one token; arguments of :func:`statex_dist.ops.naive.gla_step`.

    Returns:
        Output ``[B, H, V]``; ``state`` is the new one.
    """
    out_dtype, shape = v.dtype, v.shape
    heads = state.view(-1, *state.shape[2:])
    q, k, v, g = (y.to(state.dtype).flatten(0, 1) for y in (q * scale, k, v, g))
    decay, k, v, q = g.exp().unsqueeze(-1), k.unsqueeze(-1), v.unsqueeze(-2), q.unsqueeze(-2)
    outputs = []
    for block in _blocks(heads):
        part = heads[block].mul_(decay[block]).addcmul_(k[block], v[block])
        outputs.append(q[block] @ part)
    return torch.cat(outputs).view(shape).to(out_dtype)


def delta_step_(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    *,
    scale: float,
) -> torch.Tensor:
    """Advance the gated delta rule by one token; arguments of :func:`statex_dist.ops.delta.delta_step`.

    Returns:
        Output ``[B, HV, V]``; ``state`` is the new one.
    """
    out_dtype, shape = v.dtype, v.shape
    heads = state.view(-1, *state.shape[2:])
    q, k = (y.repeat_interleave(v.shape[1] // y.shape[1], dim=1) for y in (q * scale, k))
    q, k, v, g, beta = (y.to(state.dtype).flatten(0, 1) for y in (q, k, v, g, beta))
    decay, k, v, q, beta = g.exp().unsqueeze(-1), k.unsqueeze(-2), v.unsqueeze(-2), q.unsqueeze(-2), beta[:, None, None]
    outputs = []
    for block in _blocks(heads):
        part = heads[block].mul_(decay[block])
        write = beta[block] * (v[block] - k[block] @ part)
        part.addcmul_(k[block].mT, write)
        outputs.append(q[block] @ part)
    return torch.cat(outputs).view(shape).to(out_dtype)


def ssd_step_(
    x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, state: torch.Tensor
) -> torch.Tensor:
    """Advance the Mamba2 recurrence by one token; arguments of :func:`statex_dist.ops.naive.ssd_step`.

    Returns:
        Output ``[B, H, P]``; ``state`` is the new one.
    """
    out_dtype, shape = x.dtype, x.shape
    heads = state.view(-1, *state.shape[2:])
    x, dt, A, B, C = (y.to(state.dtype) for y in (x, dt, A, B, C))
    decay = (dt * A).exp().flatten()[:, None, None]
    inserted = (x * dt.unsqueeze(-1)).flatten(0, 1).unsqueeze(-1)
    B, C = (y.repeat_interleave(shape[1] // y.shape[1], dim=1).flatten(0, 1) for y in (B, C))
    B, C = B.unsqueeze(-2), C.unsqueeze(-1)
    outputs = []
    for block in _blocks(heads):
        part = heads[block].mul_(decay[block]).addcmul_(inserted[block], B[block])
        outputs.append(part @ C[block])
    return torch.cat(outputs).view(shape).to(out_dtype)
