"""The states carried from chunk to chunk, and their gradients carried back, in Triton: in place, with an fp32 carry.

Each program owns one tile of the state and walks over the segment's chunks; the next chunk's tile is read ahead.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from statex_dist.ops.gla.triton.segments import Segment

_ROWS, _COLUMNS = 16, 128


@triton.jit(do_not_specialize=["num_chunks"])
def carry_states_kernel(
    total,
    states,
    carried,
    initial,
    final,
    sequence,
    is_first,
    is_last,
    num_chunks,
    num_heads,
    height,
    width,
    HAS_INITIAL: tl.constexpr,
    HAS_FINAL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program per tile of the state and head."""
    i_head = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (rows < height)[:, None] & (cols < width)[None, :]
    tile = rows[:, None].to(tl.int64) * width + cols[None, :]
    state = tl.load(carried + i_head * height * width + tile, mask=inside, other=0.0)
    update = tl.load(states + i_head * num_chunks * height * width + tile, mask=inside, other=0.0).to(tl.float32)
    for i in range(num_chunks):
        chunk = i_head * num_chunks + i
        following = tl.load(states + (chunk + 1) * height * width + tile, mask=inside & (i + 1 < num_chunks), other=0.0)
        place = (tl.load(sequence + i).to(tl.int64) * num_heads + i_head) * height * width + tile
        begins = tl.load(is_first + i) != 0
        if HAS_INITIAL:
            state = tl.where(begins, tl.load(initial + place, mask=inside & begins, other=0.0), state)
        else:
            state = tl.where(begins, 0.0, state)
        tl.store(states + chunk * height * width + tile, state.to(states.dtype.element_ty), mask=inside)
        decay = tl.exp(tl.load(total + chunk * height + rows, mask=rows < height, other=0.0))
        state = state * decay[:, None] + update
        if HAS_FINAL:
            ends = tl.load(is_last + i) != 0
            tl.store(final + place, state, mask=inside & ends)
        update = following.to(tl.float32)
    tl.store(carried + i_head * height * width + tile, state, mask=inside)


@triton.jit(do_not_specialize=["num_chunks"])
def carry_gradients_kernel(
    total,
    starts,
    reads,
    mix,
    carried,
    dfinal,
    dinitial,
    dtotal,
    dmix,
    sequence,
    is_first,
    is_last,
    num_chunks,
    num_heads,
    height,
    width,
    block,
    num_partners,
    tiles_per_block,
    HAS_MIX: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_FINAL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program per tile of the state and head; a tile lies within one of the ``num_partners`` blocks of columns."""
    i_head = tl.program_id(2).to(tl.int64)
    i_tile, num_tiles = tl.program_id(0), tl.num_programs(0)
    partner = i_tile // tiles_per_block
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    cols = (i_tile % tiles_per_block) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (rows < height)[:, None] & (cols < block)[None, :]
    tile = rows[:, None].to(tl.int64) * width + partner * block + cols[None, :]
    grad = tl.load(carried + i_head * height * width + tile, mask=inside, other=0.0)
    weight = 1.0
    if HAS_MIX:
        weight = tl.load(mix + i_head * num_partners + partner).to(tl.float32)
    summed = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    last = (i_head * num_chunks + num_chunks - 1) * height * width + tile
    next_start = tl.load(starts + last, mask=inside, other=0.0)
    next_read = tl.load(reads + last, mask=inside, other=0.0)
    for m in range(num_chunks):
        i = num_chunks - 1 - m
        chunk = i_head * num_chunks + i
        start, read = next_start.to(tl.float32), next_read.to(tl.float32)
        next_start = tl.load(starts + (chunk - 1) * height * width + tile, mask=inside & (i > 0), other=0.0)
        next_read = tl.load(reads + (chunk - 1) * height * width + tile, mask=inside & (i > 0), other=0.0)
        place = (tl.load(sequence + i).to(tl.int64) * num_heads + i_head) * height * width + tile
        ends = tl.load(is_last + i) != 0
        if HAS_FINAL:
            grad = tl.where(ends, tl.load(dfinal + place, mask=inside & ends, other=0.0), grad)
        else:
            grad = tl.where(ends, 0.0, grad)
        tl.store(reads + chunk * height * width + tile, grad.to(reads.dtype.element_ty), mask=inside)
        decay = tl.exp(tl.load(total + chunk * height + rows, mask=rows < height, other=0.0))
        decayed = grad * decay[:, None]
        tl.store(dtotal + (chunk * height + rows) * num_tiles + i_tile, tl.sum(start * decayed, 1), mask=rows < height)
        if HAS_MIX:
            summed += start * read
        grad = decayed + read * weight
        if HAS_INITIAL:
            begins = tl.load(is_first + i) != 0
            tl.store(dinitial + place, grad, mask=inside & begins)
    tl.store(carried + i_head * height * width + tile, grad, mask=inside)
    if HAS_MIX:
        place = (i_head * num_tiles + i_tile) * tl.num_programs(1) + tl.program_id(1)
        tl.store(dmix + place, tl.sum(tl.sum(summed, 1), 0))


def carry_states(
    total: torch.Tensor,
    update: torch.Tensor,
    carried: torch.Tensor,
    initial: torch.Tensor | None,
    final: torch.Tensor | None,
    segment: Segment,
) -> None:
    """Run :func:`statex_dist.ops.gla.triton.reference.carry_states` in Triton."""
    heads, n, height, width = update.shape
    grid = triton.cdiv(width, _COLUMNS), triton.cdiv(height, _ROWS), heads
    tensors = total, update, carried, initial, final, segment.sequence, segment.is_first, segment.is_last
    flags = {"HAS_INITIAL": initial is not None, "HAS_FINAL": final is not None}
    carry_states_kernel[grid](*tensors, n, heads, height, width, **flags, ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=4)


def carry_gradients(
    total: torch.Tensor,
    starts: torch.Tensor,
    reads: torch.Tensor,
    mix: torch.Tensor | None,
    carried: torch.Tensor,
    dfinal: torch.Tensor | None,
    dinitial: torch.Tensor | None,
    segment: Segment,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run :func:`statex_dist.ops.gla.triton.reference.carry_gradients` in Triton."""
    heads, n, height, width = starts.shape
    partners = 1 if mix is None else mix.shape[1]
    tiles = triton.cdiv(width // partners, _COLUMNS)
    grid = (partners * tiles, triton.cdiv(height, _ROWS), heads)
    # Every tile of columns writes a sum of its own: no atomics, whose order would change the last bits.
    dtotal = total.new_empty(heads, n, height, grid[0])
    dmix = None if mix is None else total.new_empty(heads, partners, tiles * grid[1])
    tensors = total, starts, reads, mix, carried, dfinal, dinitial, dtotal, dmix
    places = segment.sequence, segment.is_first, segment.is_last
    sizes = n, heads, height, width, width // partners, partners, tiles
    flags = {"HAS_MIX": mix is not None, "HAS_INITIAL": dinitial is not None, "HAS_FINAL": dfinal is not None}
    carry_gradients_kernel[grid](*tensors, *places, *sizes, **flags, ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=4)
    return dtotal.sum(-1), None if dmix is None else dmix.sum(-1)
