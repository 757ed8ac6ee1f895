"""Chunked scans in PyTorch: exact for any gate, with gradients through outputs, initial and final states.

With ``b`` the cumulative log decay inside a chunk and ``h`` the state at its start (docs/method.md, section 3):

    A[t, u] = sum_c q_tc k_uc exp(b_tc - b_uc)   for u <= t
    o = A v + (q e^b) h,   h' = e^{b_C} h + (k e^{b_C - b})^T v

The textbook form multiplies ``q e^b`` by ``k e^{-b}``, which overflows in fp32 once a chunk's decays sum below -88.
Here ``A`` is built by halving: each off-diagonal block refers both sides to the border between its halves, so that no
exponent is ever positive, whatever the gates are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from statex_dist.errors import ConfigError
from statex_dist.ops.chunk_layout import CHUNK_SIZES, chunk_layout, pick_chunk_size
from statex_dist.ops.cu_seqlens import sequence_lengths
from statex_dist.ops.precision import wide_dtype

_BLOCK = 4


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
    batch, num_tokens = q.shape[:2]
    lengths = sequence_lengths(batch, num_tokens, cu_seqlens)
    chunk_size = power_of_two_chunks(lengths, chunk_size)
    layout = chunk_layout(lengths, chunk_size, q.device)
    values = [v] if isinstance(v, torch.Tensor) else list(v)
    out_dtype, work_dtype = values[0].dtype, wide_dtype(q.dtype)
    q, k, g = (layout.to_chunks(x).to(work_dtype) for x in (q * scale, k, g))
    b = g.cumsum(dim=2)
    total = b[:, :, -1:]
    decay, keys, queries = total.transpose(-1, -2).exp(), k * (total - b).exp(), q * b.exp()
    attention = decayed_products(q, k, b)
    states = [None] * len(values) if initial_state is None else initial_state.chunk(len(values), dim=-1)
    outputs, finals = [], []
    for value, state in zip(values, states, strict=True):
        value = layout.to_chunks(value).to(work_dtype)
        starts, final = layout.carry(decay, keys.transpose(-1, -2) @ value, state)
        outputs.append(layout.from_chunks(attention @ value + queries @ starts, batch).to(out_dtype))
        finals.append(final)
    return join_blocks(outputs), join_blocks(finals)


def power_of_two_chunks(
    lengths: tuple[int, ...],
    chunk_size: int | None,
    *,
    smallest: int = _BLOCK,
    sizes: tuple[int, ...] = CHUNK_SIZES,
) -> int:
    """Return the chunk size to use: the one asked for, or the one of ``sizes`` that fits the sequences.

    Raises:
        ConfigError: The one asked for is not a power of two from ``smallest``.
    """
    if chunk_size is None:
        return pick_chunk_size(lengths, sizes)
    if chunk_size < smallest or chunk_size & (chunk_size - 1):
        raise ConfigError(f"chunk_size must be a power of two from {smallest}, not {chunk_size}")
    return chunk_size


def join_blocks(blocks: list[torch.Tensor]) -> torch.Tensor:
    """Return value blocks side by side, without a copy where there is one."""
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=-1)


def decayed_products(q: torch.Tensor, k: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the causal ``A [..., C, C]`` of chunks ``q, k, b [..., C, K]`` with exponents that are never positive."""
    chunk_size = q.shape[-2]
    matrix = _diagonal_blocks(q, k, b)
    size = _BLOCK
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
    q_rows, k_rows, b_rows = (x.unflatten(-2, (-1, _BLOCK)).unbind(-2) for x in (q, k, b))
    nothing = q.new_zeros(()).expand(q_rows[0].shape[:-1])
    rows = []
    for t in range(_BLOCK):
        decayed = [k_rows[u] * (b_rows[t] - b_rows[u]).exp() for u in range(t)]
        entries = [(q_rows[t] * key).sum(-1) for key in (*decayed, k_rows[t])]
        rows.append(torch.stack(entries + [nothing] * (_BLOCK - 1 - t), dim=-1))
    return torch.stack(rows, dim=-2)


def chunked_ssd(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    *,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    chunk_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the Mamba2 recurrence chunk by chunk. Arguments and results are those of ``naive_ssd``.

    The decay is one number per head, so ``exp(b_t - b_u)`` is formed directly (masked before the exponential), and the
    products of B and C are made once per group, its heads folded into the width of the other factor.
    """
    batch, num_tokens, num_heads, head_dim = x.shape
    num_groups = B.shape[2]
    lengths = sequence_lengths(batch, num_tokens, cu_seqlens)
    chunk_size = pick_chunk_size(lengths) if chunk_size is None else chunk_size
    if chunk_size < 1:
        raise ConfigError(f"chunk_size must be 1 or more, not {chunk_size}")
    layout = chunk_layout(lengths, chunk_size, x.device)
    out_dtype, work_dtype = x.dtype, wide_dtype(x.dtype)
    decay_log = layout.to_chunks((dt * A).unsqueeze(-1)).to(work_dtype).squeeze(-1)
    x_dt = layout.to_chunks(x * dt.unsqueeze(-1)).to(work_dtype)
    B, C = (layout.to_chunks(y).to(work_dtype) for y in (B, C))
    b = decay_log.cumsum(dim=-1)
    total = b[..., -1:]
    later = torch.ones(chunk_size, chunk_size, dtype=torch.bool, device=x.device).triu(1)
    decay = (b.unsqueeze(-1) - b.unsqueeze(-2)).masked_fill(later, -torch.inf).exp()
    scores = (C @ B.transpose(-1, -2)).unsqueeze(2) * decay.unflatten(1, (num_groups, -1))
    within = scores.flatten(1, 2) @ x_dt
    # [chunks, G, (H/G) P, C] @ [chunks, G, C, N]
    decayed = _fold_heads(x_dt * (total - b).exp().unsqueeze(-1), num_groups)
    update = (decayed.transpose(-1, -2) @ B).flatten(1, 2).unflatten(1, (num_heads, head_dim))
    starts, final = layout.carry(total.exp().unsqueeze(-1), update, initial_state)
    folded = starts.flatten(1, 2).unflatten(1, (num_groups, -1))
    across = (C @ folded.transpose(-1, -2)).unflatten(-1, (-1, head_dim)).transpose(2, 3).flatten(1, 2)
    y = within + across * b.exp().unsqueeze(-1)
    return layout.from_chunks(y, batch).to(out_dtype), final


def _fold_heads(x: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Return ``[chunks, G, C, (H/G) P]`` from ``[chunks, H, C, P]``."""
    return x.unflatten(1, (num_groups, -1)).transpose(2, 3).flatten(-2, -1)
