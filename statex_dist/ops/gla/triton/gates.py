"""The kernels' loads of a chunk, and pre-gating: its queries and keys with their decays to and from its borders.

Pre-gating is done once. A kernel of products would compute the same exponentials again for every tile of the other
operand.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from statex_dist.ops.gla.triton.segments import Segment

BLOCK = 64
"""Rows of a block: log decays are summed within blocks, and between two blocks split at a border."""
_COLUMNS = 64


def block_rows(chunk_size: int) -> int:
    """Return the rows per block of a chunk."""
    return min(BLOCK, chunk_size)


def dot_precision(dtype: torch.dtype) -> str:
    """Return Triton's precision for products of gated rows, which are fp32 but as precise as the inputs."""
    return "ieee" if dtype == torch.float32 else "tf32"


@triton.jit
def load_tokens(x, first, rows, count, offset, stride, cols, width):
    """Return the fp32 tile ``[rows, cols]`` of a chunk that begins at token ``first`` of ``x [tokens, H, width]``.

    ``offset`` is the head's place in a token and ``stride`` the elements per token. As ``first`` is 64-bit, all
    offsets are.
    """
    inside = (rows < count)[:, None] & (cols < width)[None, :]
    return tl.load(x + (first + rows)[:, None] * stride + (offset + cols)[None, :], mask=inside, other=0.0).to(
        tl.float32
    )


@triton.jit
def load_places(x, chunk, rows, cols, width):
    """Return the fp32 tile ``[rows, cols]`` of one chunk; ``chunk`` is its 64-bit offset in ``x``, in elements."""
    return tl.load(x + chunk + rows[:, None] * width + cols[None, :], mask=(cols < width)[None, :], other=0.0).to(
        tl.float32
    )


@triton.jit
def load_row(x, chunk, row, cols, width):
    """Return one fp32 row ``[cols]`` of one chunk."""
    return tl.load(x + chunk + row * width + cols, mask=cols < width, other=0.0).to(tl.float32)


@triton.jit
def gate_columns(cols, gates, REPEATED: tl.constexpr):
    """Return which of the ``gates`` log decays of a head those channels have: they repeat where there are fewer."""
    columns = cols
    if REPEATED:
        columns = cols % gates
    return columns


@triton.jit(do_not_specialize=["num_chunks"])
def pregate_kernel(
    q,
    k,
    g,
    prefix,
    queries,
    keys,
    total,
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
    COLUMNS: tl.constexpr,
):
    """One program per tile of channels, chunk and head."""
    cols = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    gate_cols = gate_columns(cols, gates, REPEATED)
    i_chunk, i_head = tl.program_id(1), tl.program_id(2)
    first, count = tl.load(start + i_chunk), tl.load(length + i_chunk)
    stride, offset = num_heads * width, i_head * width
    place = i_head.to(tl.int64) * num_chunks + i_chunk
    chunk = place * CHUNK * width
    before = tl.zeros([COLUMNS], dtype=tl.float32)
    for i in range(CHUNK // BLOCK):
        rows = i * BLOCK + tl.arange(0, BLOCK)
        decays = load_tokens(g, first, rows, count, i_head * gates, num_heads * gates, gate_cols, gates)
        summed = tl.cumsum(decays, 0)
        gated = (
            load_tokens(q, first, rows, count, offset, stride, cols, width) * tl.exp(summed + before[None, :]) * scale
        )
        target = chunk + rows[:, None] * width + cols[None, :]
        inside = (cols < width)[None, :]
        kept = (place * CHUNK + rows[:, None]) * gates + cols[None, :]
        tl.store(prefix + kept, summed, mask=(cols < gates)[None, :])
        tl.store(queries + target, gated.to(queries.dtype.element_ty), mask=inside)
        before += tl.sum(decays, 0)
    tl.store(total + place * width + cols, before, mask=cols < width)
    after = tl.zeros([COLUMNS], dtype=tl.float32)
    for m in range(CHUNK // BLOCK):
        rows = CHUNK - (m + 1) * BLOCK + tl.arange(0, BLOCK)
        decays = load_tokens(g, first, rows, count, i_head * gates, num_heads * gates, gate_cols, gates)
        later = tl.cumsum(decays, 0, reverse=True) - decays + after[None, :]
        gated = load_tokens(k, first, rows, count, offset, stride, cols, width) * tl.exp(later)
        target = chunk + rows[:, None] * width + cols[None, :]
        tl.store(keys + target, gated.to(keys.dtype.element_ty), mask=(cols < width)[None, :])
        after += tl.sum(decays, 0)


def pregate(
    q: torch.Tensor, k: torch.Tensor, g: torch.Tensor, segment: Segment, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run :func:`statex_dist.ops.gla.triton.reference.pregate` in Triton.

    The first result holds log decays summed within blocks of :func:`block_rows` rows, in fp32: differences of short
    sums round less than those of long ones.
    """
    (_, heads, width), n, size, gates = q.shape, segment.num_chunks, segment.chunk_size, g.shape[-1]
    prefix = q.new_empty(heads, n, size, gates, dtype=torch.float32)
    queries, keys = (q.new_empty(heads, n, size, width) for _ in range(2))
    total = q.new_empty(heads, n, width, dtype=torch.float32)
    tensors = q, k, g, prefix, queries, keys, total, segment.start, segment.length
    constants = {"REPEATED": gates < width, "CHUNK": size, "BLOCK": block_rows(size), "COLUMNS": _COLUMNS}
    grid = triton.cdiv(width, _COLUMNS), n, heads
    pregate_kernel[grid](*tensors, float(scale), n, heads, width, gates, **constants, num_warps=8)
    return prefix, queries, keys, total
