"""Gated linear attention in PyTorch: token by token (the oracle), one step of decoding, and chunk by chunk.

Shapes follow flash-linear-attention: ``B`` batch, ``T`` tokens, ``H`` heads, ``K`` key channels, ``V`` value channels.
With ``cu_seqlens [S + 1]`` the batch is one row of ``S`` packed sequences, each with a state of its own. Everything
runs in the dtype of the state: fp32, or float64 for float64 inputs; outputs come back in the dtype of ``v``.

Chunked, with ``b`` the cumulative log decay inside a chunk and ``h`` the state at its start (docs/method.md, 3):

    A[t, u] = sum_c q_tc k_uc exp(b_tc - b_uc)   for u <= t
    o = A v + (q e^b) h,   h' = e^{b_C} h + (k e^{b_C - b})^T v

The textbook form of ``A`` multiplies ``q e^b`` by ``k e^{-b}``, which overflows in fp32 once the decays sum below -88.
No exponent is ever positive here, whatever the gates are.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from statex_dist.ops.cu_seqlens import SMALLEST_BLOCK, causal_decay, power_of_two_layout
from statex_dist.ops.features import Features, widened_gla
from statex_dist.ops.head_mixing import mix_outputs, spread_values
from statex_dist.ops.token_steps import scan_tokens, step_in_blocks


def gla_step(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, state: torch.Tensor, *, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advance gated linear attention by one token (arXiv 2312.06635, equation 3).

    Args:
        q: ``[B, H, K]`` queries.
        k: ``[B, H, K]`` keys.
        v: ``[B, H, V]`` values.
        g: ``[B, H, K]`` log decays, at most 0.
        state: ``[B, H, K, V]``.
        scale: Factor of the queries.

    Returns:
        Output ``[B, H, V]`` and the new state.
    """
    out_dtype = v.dtype
    q, k, v, g = (y.to(state.dtype) for y in (q, k, v, g))
    state = state * g.exp().unsqueeze(-1) + k.unsqueeze(-1) * v.unsqueeze(-2)
    return torch.einsum("bhk,bhkv->bhv", q * scale, state).to(out_dtype), state


def gla_step_(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, state: torch.Tensor, *, scale: float
) -> torch.Tensor:
    """Run :func:`gla_step` over a contiguous ``state``, which it overwrites; return the output ``[B, H, V]``."""
    out_dtype, shape = v.dtype, v.shape
    q, k, v, g = (y.to(state.dtype).flatten(0, 1) for y in (q * scale, k, v, g))

    def advance(heads: torch.Tensor, decay, k, v, q) -> torch.Tensor:
        heads.mul_(decay).addcmul_(k, v)
        return q @ heads

    inputs = g.exp().unsqueeze(-1), k.unsqueeze(-1), v.unsqueeze(-2), q.unsqueeze(-2)
    return step_in_blocks(advance, state, inputs).view(shape).to(out_dtype)


def gla_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    state: torch.Tensor,
    *,
    scale: float | None = None,
    mix: torch.Tensor | None = None,
    features: Features | None = None,
    overwrite: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advance ``gla`` by one token: ``q, k, g [B, H, K]``, ``v [B, H, V]``, ``state [B, H, K, r V]``.

    With ``overwrite`` the new state takes the old one's place in memory: without autograd, and if the caller owns it.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if features is not None:
        q, k, v, g = widened_gla((q, k, v, g), features)
    if mix is not None:
        v = spread_values(v, mix.shape[1])
    if overwrite and state.is_contiguous():
        o = gla_step_(q, k, v, g, state, scale=scale)
    else:
        o, state = gla_step(q, k, v, g, state, scale=scale)
    return (o if mix is None else mix_outputs(o, mix)), state


def naive_gla(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    *,
    scale: float,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run :func:`gla_step` token by token: the oracle of all other forms.

    Args:
        q: ``[B, T, H, K]``, as all others with ``T`` tokens.
        k: Keys.
        v: Values.
        g: Log decays.
        scale: Factor of the queries.
        initial_state: ``[S, H, K, V]``, zero where None; ``S`` is the batch, or the number of packed sequences.
        cu_seqlens: ``[S + 1]`` borders of packed sequences; ``B`` must be 1.

    Returns:
        Output ``[B, T, H, V]`` and final states ``[S, H, K, V]``.
    """
    state_shape = (*q.shape[2:], v.shape[3])
    step = partial(gla_step, scale=scale)
    return scan_tokens(step, (q, k, v, g), v, state_shape, initial_state=initial_state, cu_seqlens=cu_seqlens)


def chunked_gla(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | Sequence[torch.Tensor],
    g: torch.Tensor,
    *,
    scale: float,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    chunk_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run gated linear attention chunk by chunk. Arguments and results are those of ``naive_gla``.

    Args:
        v: Values; or several tensors of the same shape, which stand for their concatenation along the last dimension.
            Each is then multiplied by itself: a wider product may sum in another order, and a mixed layer could not
            start from the original's exact numbers.
        chunk_size: Tokens per chunk, a power of two from 4; None picks one by the sequences' lengths.

    Returns:
        Output ``[B, T, H, V]`` in ``v``'s dtype and final states ``[S, H, K, V]`` in fp32 (float64 for float64).

    Raises:
        ConfigError: ``chunk_size`` is not a power of two from 4.
    """
    layout = power_of_two_layout(q, cu_seqlens, chunk_size)
    q, k, g = layout.to_wide_chunks(q * scale, k, g)
    b = g.cumsum(dim=2)
    total = b[:, :, -1:]
    decay, keys, queries = total.transpose(-1, -2).exp(), k * (total - b).exp(), q * b.exp()
    attention = decayed_products(q, k, b)

    def scan(values: torch.Tensor, state: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        values = values.to(q.dtype)
        starts, final = layout.carry(decay, keys.transpose(-1, -2) @ values, state)
        return attention @ values + queries @ starts, final

    return layout.scan_values(v, initial_state, scan)


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
