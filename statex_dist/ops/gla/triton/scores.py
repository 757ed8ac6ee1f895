"""The decayed products of queries and keys inside a chunk, and the gradients of all inputs, in Triton.

``A[t, u] = s sum_c q_tc k_uc exp(b_tc - b_uc)`` is built from blocks of 64 rows. Between two blocks the decay is split
at the border of the later one, so that no exponent is positive. Within a block it is split at the middle row, which is
right as long as the log decays on each side of it sum to less than 40, as those of GLA do. Where they do not (checked
for every tile), that tile is computed row by row from differences, which no finite gate overflows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from statex_dist.ops.gla.triton.gates import block_rows, dot_precision, gate_columns, load_places, load_row, load_tokens
from statex_dist.ops.gla.triton.segments import Segment

_SPLIT_LIMIT = tl.constexpr(40.0)


@triton.autotune(
    configs=[
        triton.Config({"COLUMNS": c}, num_warps=w, num_stages=s) for c, w, s in ((32, 8, 2), (64, 8, 2), (32, 4, 3))
    ],
    key=["width", "CHUNK"],
)
@triton.jit(do_not_specialize=["num_chunks"])
def scores_kernel(
    q,
    k,
    prefix,
    out,
    start,
    length,
    scale,
    num_chunks,
    num_heads,
    width,
    gates,
    REPEATED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program per pair of blocks, chunk and head."""
    i_chunk, i_head = tl.program_id(1), tl.program_id(2)
    late, early = tl.program_id(0) // (CHUNK // BLOCK), tl.program_id(0) % (CHUNK // BLOCK)
    first, count = tl.load(start + i_chunk), tl.load(length + i_chunk)
    stride, offset = num_heads * width, i_head * width
    place = i_head.to(tl.int64) * num_chunks + i_chunk
    chunk = place * CHUNK * gates
    within = tl.arange(0, BLOCK)
    rows, columns = late * BLOCK + within, early * BLOCK + within
    acc = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
    if early <= late:
        for low in range(0, width, COLUMNS):
            cols = low + tl.arange(0, COLUMNS)
            gate_cols = gate_columns(cols, gates, REPEATED)
            q_rows = load_tokens(q, first, rows, count, offset, stride, cols, width)
            k_rows = load_tokens(k, first, columns, count, offset, stride, cols, width)
            p_rows = load_places(prefix, chunk, rows, gate_cols, gates)
            if early < late:
                gap = tl.zeros([COLUMNS], dtype=tl.float32)
                for block in range(early, late):
                    gap += load_row(prefix, chunk, block * BLOCK + BLOCK - 1, gate_cols, gates)
                p_columns = load_places(prefix, chunk, columns, gate_cols, gates)
                keys = k_rows * tl.exp(gap[None, :] - p_columns)
                acc += tl.dot(q_rows * tl.exp(p_rows), tl.trans(keys), input_precision=PRECISION)
            else:
                middle = load_row(prefix, chunk, late * BLOCK + BLOCK // 2, gate_cols, gates)
                if tl.max(tl.max(tl.abs(p_rows - middle[None, :]), 1), 0) < _SPLIT_LIMIT:
                    keys = k_rows * tl.exp(middle[None, :] - p_rows)
                    acc += tl.dot(q_rows * tl.exp(p_rows - middle[None, :]), tl.trans(keys), input_precision=PRECISION)
                else:
                    for u in range(BLOCK):
                        key = tl.sum(tl.where((within == u)[:, None], k_rows, 0.0), 0)
                        p_row = load_row(prefix, chunk, late * BLOCK + u, gate_cols, gates)
                        decay = tl.exp(tl.minimum(p_rows - p_row[None, :], 0.0))
                        column = tl.sum(q_rows * key[None, :] * decay, 1)
                        acc += tl.where((within == u)[None, :], column[:, None], 0.0)
        acc = tl.where(rows[:, None] >= columns[None, :], acc * scale, 0.0)
    target = place * CHUNK * CHUNK + rows[:, None] * CHUNK + columns[None, :]
    tl.store(out + target, acc.to(out.dtype.element_ty))


@triton.autotune(
    configs=[triton.Config({"COLUMNS": c}, num_warps=w, num_stages=s) for c, w, s in ((32, 8, 2), (16, 4, 2))],
    key=["width", "CHUNK"],
)
@triton.jit(do_not_specialize=["num_chunks"])
def input_gradients_kernel(
    q,
    k,
    prefix,
    dscores,
    dqueries,
    dkeys,
    dtotal,
    dq,
    dk,
    dg,
    start,
    length,
    scale,
    num_chunks,
    num_heads,
    width,
    gates,
    REPEATED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program per tile of channels, chunk and head; blocks from the last to the first, as ``dg`` is summed.

    With ``dk'`` the part of ``dk`` that comes through the state at the chunk's end,
    ``dg_t = sum_{u >= t} (q_u dq_u - k_u dk_u) + sum_u k_u dk'_u + d(total)``: every log decay of the chunk is part of
    the total, so ``summed`` starts with the last two.
    """
    cols = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    gate_cols = gate_columns(cols, gates, REPEATED)
    i_chunk, i_head = tl.program_id(1), tl.program_id(2)
    num_blocks = CHUNK // BLOCK
    first, count = tl.load(start + i_chunk), tl.load(length + i_chunk)
    stride, offset = num_heads * width, i_head * width
    place = i_head.to(tl.int64) * num_chunks + i_chunk
    chunk, gate_chunk, matrix = place * CHUNK * width, place * CHUNK * gates, place * CHUNK * CHUNK
    within = tl.arange(0, BLOCK)
    lower = within[:, None] >= within[None, :]

    # What every token's log decay gets from the end of the chunk: through the state there, and the keys in it.
    summed = tl.load(dtotal + place * width + cols, mask=cols < width, other=0.0).to(tl.float32)
    after = tl.zeros([COLUMNS], dtype=tl.float32)
    for m in range(num_blocks):
        i = num_blocks - 1 - m
        rows = i * BLOCK + within
        p_rows = load_places(prefix, gate_chunk, rows, gate_cols, gates)
        p_end = load_row(prefix, gate_chunk, i * BLOCK + BLOCK - 1, gate_cols, gates)
        k_rows = load_tokens(k, first, rows, count, offset, stride, cols, width)
        gated = load_places(dkeys, chunk, rows, cols, width) * tl.exp((p_end + after)[None, :] - p_rows)
        summed += tl.sum(k_rows * gated, 0)
        after += p_end

    after = tl.zeros([COLUMNS], dtype=tl.float32)
    for m in range(num_blocks):
        i = num_blocks - 1 - m
        rows = i * BLOCK + within
        q_rows = load_tokens(q, first, rows, count, offset, stride, cols, width)
        k_rows = load_tokens(k, first, rows, count, offset, stride, cols, width)
        p_rows = load_places(prefix, gate_chunk, rows, gate_cols, gates)
        p_end = load_row(prefix, gate_chunk, i * BLOCK + BLOCK - 1, gate_cols, gates)

        dq_rows = tl.zeros([BLOCK, COLUMNS], dtype=tl.float32)
        before = tl.zeros([COLUMNS], dtype=tl.float32)
        for back in range(i):
            j = i - 1 - back
            others = j * BLOCK + within
            p_others = load_places(prefix, gate_chunk, others, gate_cols, gates)
            end = load_row(prefix, gate_chunk, j * BLOCK + BLOCK - 1, gate_cols, gates)
            keys = load_tokens(k, first, others, count, offset, stride, cols, width)
            keys = keys * tl.exp((end + before)[None, :] - p_others)
            grads = tl.load(dscores + matrix + rows[:, None] * CHUNK + others[None, :]).to(tl.float32)
            dq_rows += tl.dot(grads, keys, input_precision=PRECISION)
            before += end
        dq_rows *= tl.exp(p_rows)

        dk_rows = tl.zeros([BLOCK, COLUMNS], dtype=tl.float32)
        between = tl.zeros([COLUMNS], dtype=tl.float32)
        for j in range(i + 1, num_blocks):
            others = j * BLOCK + within
            p_others = load_places(prefix, gate_chunk, others, gate_cols, gates)
            queries = load_tokens(q, first, others, count, offset, stride, cols, width)
            queries = queries * tl.exp(between[None, :] + p_others)
            grads = tl.load(dscores + matrix + others[None, :] * CHUNK + rows[:, None]).to(tl.float32)
            dk_rows += tl.dot(grads, queries, input_precision=PRECISION)
            between += load_row(prefix, gate_chunk, j * BLOCK + BLOCK - 1, gate_cols, gates)
        dk_rows *= tl.exp(p_end[None, :] - p_rows)

        grads = tl.load(dscores + matrix + rows[:, None] * CHUNK + rows[None, :]).to(tl.float32)
        grads = tl.where(lower, grads, 0.0)
        middle = load_row(prefix, gate_chunk, i * BLOCK + BLOCK // 2, gate_cols, gates)
        if tl.max(tl.max(tl.abs(p_rows - middle[None, :]), 1), 0) < _SPLIT_LIMIT:
            rise, fall = tl.exp(p_rows - middle[None, :]), tl.exp(middle[None, :] - p_rows)
            dq_rows += rise * tl.dot(grads, k_rows * fall, input_precision=PRECISION)
            dk_rows += fall * tl.dot(tl.trans(grads), q_rows * rise, input_precision=PRECISION)
        else:
            for u in range(BLOCK):
                is_row = (within == u)[:, None]
                key = tl.sum(tl.where(is_row, k_rows, 0.0), 0)
                p_row = load_row(prefix, gate_chunk, i * BLOCK + u, gate_cols, gates)
                column = tl.sum(tl.where((within == u)[None, :], grads, 0.0), 1)
                decayed = column[:, None] * tl.exp(tl.minimum(p_rows - p_row[None, :], 0.0))
                dq_rows += decayed * key[None, :]
                dk_rows += tl.where(is_row, tl.sum(decayed * q_rows, 0)[None, :], 0.0)

        inside = (rows < count)[:, None] & (cols < width)[None, :]
        dq_rows += load_places(dqueries, chunk, rows, cols, width) * tl.exp(before[None, :] + p_rows)
        dq_rows *= scale
        gated = load_places(dkeys, chunk, rows, cols, width) * tl.exp((p_end + after)[None, :] - p_rows)
        dk_rows = dk_rows * scale + gated
        change = q_rows * dq_rows - k_rows * dk_rows
        target = (first + rows)[:, None] * stride + (offset + cols)[None, :]
        tl.store(dq + target, dq_rows.to(dq.dtype.element_ty), mask=inside)
        tl.store(dk + target, dk_rows.to(dk.dtype.element_ty), mask=inside)
        decay_rows = tl.cumsum(change, 0, reverse=True) + summed[None, :]
        tl.store(dg + target, decay_rows.to(dg.dtype.element_ty), mask=inside)
        summed += tl.sum(change, 0)
        after += p_end


def scores(q: torch.Tensor, k: torch.Tensor, prefix: torch.Tensor, segment: Segment, scale: float) -> torch.Tensor:
    """Run :func:`statex_dist.ops.gla.triton.reference.scores` in Triton; ``prefix`` is that of :func:`pregate`."""
    (_, heads, width), n, size, gates = q.shape, segment.num_chunks, segment.chunk_size, prefix.shape[-1]
    out = q.new_empty(heads, n, size, size)
    rows = block_rows(size)
    constants = {"REPEATED": gates < width, "CHUNK": size, "BLOCK": rows, "PRECISION": dot_precision(q.dtype)}
    tensors = q, k, prefix, out, segment.start, segment.length
    scores_kernel[((size // rows) ** 2, n, heads)](*tensors, float(scale), n, heads, width, gates, **constants)
    return out


def input_gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    prefix: torch.Tensor,
    dscores: torch.Tensor,
    dqueries: torch.Tensor,
    dkeys: torch.Tensor,
    dtotal: torch.Tensor,
    segment: Segment,
    scale: float,
    out: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    """Run :func:`statex_dist.ops.gla.triton.reference.input_gradients` in Triton."""
    (_, heads, width), n, size, gates = q.shape, segment.num_chunks, segment.chunk_size, prefix.shape[-1]
    dq, dk, dg = out
    # Channels that share a log decay each have a part of its gradient.
    parts = q.new_empty(q.shape, dtype=torch.float32) if gates < width else dg

    def grid(meta: dict) -> tuple[int, int, int]:
        return triton.cdiv(width, meta["COLUMNS"]), n, heads

    constants = {"CHUNK": size, "BLOCK": block_rows(size), "PRECISION": dot_precision(q.dtype)}
    tensors = q, k, prefix, dscores, dqueries, dkeys, dtotal, dq, dk, parts, segment.start, segment.length
    sizes = float(scale), n, heads, width, gates
    input_gradients_kernel[grid](*tensors, *sizes, REPEATED=gates < width, **constants)
    if gates < width:
        dg.copy_(parts.unflatten(-1, (-1, gates)).sum(-2))
