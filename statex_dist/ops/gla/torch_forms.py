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

from statex_dist.ops.chunk_groups import ChunkRun
from statex_dist.ops.cu_seqlens import SMALLEST_BLOCK, at_least_fp32, causal_decay, power_of_two_layout
from statex_dist.ops.features import (
    Features,
    block_sizes,
    decay_rows,
    decayed,
    join_sum,
    linear_products,
    repeated_decays,
    state_blocks,
    widened_gla,
)
from statex_dist.ops.head_mixing import mix_outputs, spread_values
from statex_dist.ops.token_steps import scan_tokens, step_in_blocks


def gla_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    state: torch.Tensor,
    *,
    scale: float,
    projected: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advance gated linear attention by one token (arXiv 2312.06635, equation 3).

    Args:
        q: ``[B, H, K]`` queries.
        k: ``[B, H, K]`` keys.
        v: ``[B, H, V]`` values.
        g: ``[B, H, K]`` log decays, at most 0.
        state: ``[B, H, K, V]``.
        scale: Factor of the queries.
        projected: Number of the key channels that are no products, where the others are: each of the two blocks is
            then summed by itself.

    Returns:
        Output ``[B, H, V]`` and the new state.
    """
    out_dtype = v.dtype
    q, k, v, g = (y.to(state.dtype) for y in (q, k, v, g))
    state = state * g.exp().unsqueeze(-1) + k.unsqueeze(-1) * v.unsqueeze(-2)
    return read_rows(q * scale, state, projected).to(out_dtype), state


def read_rows(q: torch.Tensor, state: torch.Tensor, projected: int | None = None) -> torch.Tensor:
    """Return ``q S``: ``q [B, H, K]``, ``state [B, H, K, V]``; the rows from ``projected`` are summed by themselves."""
    sizes = block_sizes(q.shape[-1], projected)
    pairs = zip(q.split(sizes, dim=-1), state.split(sizes, dim=-2), strict=True)
    return join_sum([torch.einsum("bhk,bhkv->bhv", y, rows) for y, rows in pairs])


def gla_step_(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    state: torch.Tensor,
    *,
    scale: float,
    projected: int | None = None,
) -> torch.Tensor:
    """Run :func:`gla_step` over a contiguous ``state``, which it overwrites; return the output ``[B, H, V]``."""
    out_dtype, shape = v.dtype, v.shape
    q, k, v, g = (y.to(state.dtype).flatten(0, 1) for y in (q * scale, k, v, g))

    def advance(heads: torch.Tensor, decay, k, v, q) -> torch.Tensor:
        heads.mul_(decay).addcmul_(k, v)
        return row_product(q, heads, projected)

    inputs = g.exp().unsqueeze(-1), k.unsqueeze(-1), v.unsqueeze(-2), q.unsqueeze(-2)
    return step_in_blocks(advance, state, inputs).view(shape).to(out_dtype)


def row_product(q: torch.Tensor, heads: torch.Tensor, projected: int | None = None) -> torch.Tensor:
    """Return ``q [n, 1, K] @ heads [n, K, V]``; the rows from ``projected`` are summed by themselves."""
    sizes = block_sizes(q.shape[-1], projected)
    pairs = zip(q.split(sizes, dim=-1), heads.split(sizes, dim=-2), strict=True)
    return join_sum([y @ rows for y, rows in pairs])


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
    in_place = overwrite and state.is_contiguous()
    projected = None
    if features is not None:
        projected = q.shape[-1]
        g = repeated_decays(g, projected, features)
        added_q, added_k = linear_products(q, k, features)
        if in_place:
            q, added_q, scale = q * scale, added_q * scale, 1.0
        q, k = (torch.cat([x.to(y.dtype), y], dim=-1) for x, y in ((q, added_q), (k, added_k)))
    if mix is not None:
        v = spread_values(v, mix.shape[1])
    if in_place:
        o = gla_step_(q, k, v, g, state, scale=scale, projected=projected)
    else:
        o, state = gla_step(q, k, v, g, state, scale=scale, projected=projected)
    return (o if mix is None else mix_outputs(o, mix)), state


def naive_gla(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    *,
    scale: float,
    features: Features | None = None,
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
        features: Products that are key channels of the state too, or None.
        initial_state: ``[S, H, K, V]``, zero where None; ``S`` is the batch, or the number of packed sequences.
        cu_seqlens: ``[S + 1]`` borders of packed sequences; ``B`` must be 1.

    Returns:
        Output ``[B, T, H, V]`` and final states ``[S, H, K, V]``.
    """
    projected = None
    if features is not None:
        projected = q.shape[-1]
        q, k, v, g = widened_gla((at_least_fp32(q), at_least_fp32(k), v, g), features)
    state_shape = (*q.shape[2:], v.shape[3])
    step = partial(gla_step, scale=scale, projected=projected)
    return scan_tokens(step, (q, k, v, g), v, state_shape, initial_state=initial_state, cu_seqlens=cu_seqlens)


def chunked_gla(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | Sequence[torch.Tensor],
    g: torch.Tensor,
    *,
    scale: float,
    features: Features | None = None,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    chunk_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run gated linear attention chunk by chunk. Arguments and results are those of ``naive_gla``.

    Args:
        v: Values; or several tensors of the same shape, which stand for their concatenation along the last dimension.
            Each is then multiplied by itself: a wider product may sum in another order, and a mixed layer could not
            start from the original's exact numbers. For the same reason products are summed by themselves.
        chunk_size: Tokens per chunk, a power of two from 4; None picks one by the sequences' lengths.

    Returns:
        Output ``[B, T, H, V]`` in ``v``'s dtype and final states ``[S, H, K, V]`` in fp32 (float64 for float64).

    Raises:
        ConfigError: ``chunk_size`` is not a power of two from 4.
    """
    layout = power_of_two_layout(q, cu_seqlens, chunk_size)
    body = partial(_gla_chunks, scale=scale, features=None if features is None else features.of_chunks())
    return layout.scan_values(body, (q, k, g), v, initial_state, state_blocks(q.shape[-1], features))


def _gla_chunks(
    run: ChunkRun,
    chunks: Sequence[torch.Tensor],
    states: Sequence[torch.Tensor],
    *,
    scale: float,
    features: Features | None,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Run a group of chunks ``q, k, g`` and values ``[num_chunks, H, C, .]``, from the states of each value's rows."""
    q, k, g, *values = chunks
    added = None if features is None else linear_products(q, k, features)
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, g = (x.to(wide) for x in (q * scale, k, g))
    b = g.cumsum(dim=2)
    total = b[:, :, -1:]
    decay, to_end = total.transpose(-1, -2).exp(), (total - b).exp()
    from_start = b.exp()
    blocks = [(decay, k * to_end, q * from_start)]
    if added is not None:
        added = added[0] * scale, added[1]
        rows = decay_rows(decay, added[1].shape[-1])
        blocks.append((rows, decayed(added[1], to_end), decayed(added[0], from_start)))
    attention = decayed_products(q, k, b, added)
    outputs, finals, before = [], [], iter(states)
    for value in values:
        value = value.to(wide)
        passed = []
        for decay, keys, _ in blocks:
            starts, final = run.carry(decay, keys.transpose(-1, -2) @ value, next(before))
            passed.append(starts)
            finals.append(final)
        output = attention @ value
        for (_, _, queries), starts in zip(blocks, passed, strict=True):
            output = output + queries @ starts
        outputs.append(output)
    return outputs, finals


def decayed_products(
    q: torch.Tensor, k: torch.Tensor, b: torch.Tensor, added: tuple[torch.Tensor, torch.Tensor] | None = None
) -> torch.Tensor:
    """Return the causal ``A[t, u] = sum_c q_tc k_uc exp(b_tc - b_uc)`` of chunks, ``[..., C, C]``.

    With a decay per channel it is built by halving: each off-diagonal block refers both sides to the border between
    its halves.

    Args:
        q: ``[..., C, K]``, ``C`` a power of two from 4.
        k: ``[..., C, K]``.
        b: ``[..., C, K]`` or ``[..., C, 1]`` log decays, summed so far.
        added: Further channels ``[..., C, n K]`` of both, whose decays repeat those of ``K`` channels. Their part is
            summed by itself.
    """
    pairs = [(q, k)] if added is None else [(q, k), added]
    if b.shape[-1] < q.shape[-1]:
        return join_sum([q @ k.transpose(-1, -2) for q, k in pairs]) * causal_decay(b, b.transpose(-1, -2))
    chunk_size = q.shape[-2]
    matrix = _diagonal_blocks(pairs, b)
    size = SMALLEST_BLOCK
    while size < chunk_size:
        halves = [[x.unflatten(-2, (-1, 2, size))[..., i, :, :] for x, i in ((q, 1), (k, 0))] for q, k in pairs]
        b_early, b_late = b.unflatten(-2, (-1, 2, size)).unbind(-3)
        border = b_early[..., -1:, :]
        late, early = (b_late - border).exp(), (border - b_early).exp()
        corner = join_sum([decayed(q, late) @ decayed(k, early).transpose(-1, -2) for q, k in halves])
        first, last = matrix.unflatten(-3, (-1, 2)).unbind(-3)
        top = torch.cat([first, first.new_zeros(()).expand_as(first)], dim=-1)
        matrix = torch.cat([top, torch.cat([corner, last], dim=-1)], dim=-2)
        size *= 2
    return matrix.squeeze(-3)


def _diagonal_blocks(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], b: torch.Tensor) -> torch.Tensor:
    """Return the causal ``[..., C / 4, 4, 4]`` blocks on the diagonal of ``A``.

    Written out entry by entry: the four diagonal entries need no exponential and the six above it nothing at all, which
    makes this twice as fast as a masked ``[..., 4, 4, K]`` tensor and its gradient.
    """
    q_rows, k_rows, b_rows = (_rows_of_blocks(x) for x in (*pairs[0], b))
    added = [[_rows_of_blocks(x) for x in pair] for pair in pairs[1:]]
    nothing = q_rows[0].new_zeros(()).expand(q_rows[0].shape[:-1])
    rows = []
    for t in range(SMALLEST_BLOCK):
        decays = [(b_rows[t] - b_rows[u]).exp() for u in range(t)]
        keys = [*(k_rows[u] * decays[u] for u in range(t)), k_rows[t]]
        entries = [(q_rows[t] * key).sum(-1) for key in keys]
        for q_added, k_added in added:
            shared = [(q_added[t] * k_added[u]).unflatten(-1, (-1, b.shape[-1])).sum(-2) for u in range(t + 1)]
            weighted = [*(x * decay for x, decay in zip(shared, decays, strict=False)), shared[t]]
            entries = [entry + x.sum(-1) for entry, x in zip(entries, weighted, strict=True)]
        rows.append(torch.stack(entries + [nothing] * (SMALLEST_BLOCK - 1 - t), dim=-1))
    return torch.stack(rows, dim=-2)


def _rows_of_blocks(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return x.unflatten(-2, (-1, SMALLEST_BLOCK)).unbind(-2)
