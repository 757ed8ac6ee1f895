"""What the kernels share: loads of a chunk's rows, and the shapes of their tiles."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 64
"""Rows of a block: log decays are summed within blocks, and between two blocks split at a border."""


def block_rows(chunk_size: int) -> int:
    """Return the rows per block of a chunk."""
    return min(BLOCK, chunk_size)


def dot_precision(dtype: torch.dtype) -> str:
    """Return Triton's precision for products of gated rows, which are fp32 but as rough as what they came from."""
    return "ieee" if dtype == torch.float32 else "tf32"


@triton.jit
def load_tokens(x, first, rows, count, offset, stride, cols, width):
    """Return the fp32 tile ``[rows, cols]`` of a chunk that begins at token ``first`` of ``x [tokens, H, width]``.

    ``offset`` is the head's place in a token and ``stride`` the numbers per token. ``first`` is 64-bit, and with it all
    offsets.
    """
    inside = (rows < count)[:, None] & (cols < width)[None, :]
    return tl.load(x + (first + rows)[:, None] * stride + (offset + cols)[None, :], mask=inside, other=0.0).to(
        tl.float32
    )


@triton.jit
def load_places(x, chunk, rows, cols, width):
    """Return the fp32 tile ``[rows, cols]`` of one chunk; ``chunk`` is its 64-bit place in ``x``, in numbers."""
    return tl.load(x + chunk + rows[:, None] * width + cols[None, :], mask=(cols < width)[None, :], other=0.0).to(
        tl.float32
    )


@triton.jit
def load_row(x, chunk, row, cols, width):
    """Return one fp32 row ``[cols]`` of one chunk."""
    return tl.load(x + chunk + row * width + cols, mask=cols < width, other=0.0).to(tl.float32)
