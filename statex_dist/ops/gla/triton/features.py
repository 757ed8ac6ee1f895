"""Products of channels as further channels, and their gradients, in Triton: what :mod:`statex_dist.ops.features` does.

Each program has all ``K`` channels of one head for a few tokens: products need any two of them, and norms all. It
computes in fp32 and rounds once.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import triton
import triton.language as tl

from statex_dist.ops.cu_seqlens import index_tensor
from statex_dist.ops.features import SMALLEST_NORM, Features

_TILE = 4096
"""Numbers of a program's tile: tokens times channels."""
_SMALLEST_NORM = tl.constexpr(SMALLEST_NORM)


@triton.jit
def load_rolled(x, source, cols, shift, inside, width):
    """Return the fp32 rows that begin at ``source``, channel ``c`` with the value of channel ``c + shift``."""
    places = source[:, None] + ((cols + shift) % width)[None, :]
    return tl.load(x + places, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def load_factors(x, source, cols, shift, inside, width, RELU: tl.constexpr):
    """Return the same of ``x``, or of ``relu(x)``: the factors of products."""
    factors = load_rolled(x, source, cols, shift, inside, width)
    if RELU:
        factors = tl.maximum(factors, 0.0)
    return factors


@triton.jit
def load_gains(gain, first, cols, shift, width):
    """Return the gains of one block of products of a head, of channels ``c + shift``."""
    return tl.load(gain + first + (cols + shift) % width, mask=cols < width, other=0.0)


@triton.jit(do_not_specialize=["num_tokens"])
def widen_kernel(
    x,
    gain,
    rolls,
    out,
    num_tokens,
    num_heads,
    width,
    num_rolls,
    HAS_GAIN: tl.constexpr,
    RELU: tl.constexpr,
    MATCH_NORM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program per ``ROWS`` tokens and head."""
    head = tl.program_id(1)
    rows, cols = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    inside = (rows < num_tokens)[:, None] & (cols < width)[None, :]
    source = (rows * num_heads + head) * width
    target = (source * (1 + num_rolls))[:, None] + cols[None, :]
    channels = load_rolled(x, source, cols, 0, inside, width)
    tl.store(out + target, channels.to(out.dtype.element_ty), mask=inside)
    factors = load_factors(x, source, cols, 0, inside, width, RELU)
    ratio = tl.full([ROWS], 1.0, dtype=tl.float32)
    if MATCH_NORM:
        squares = tl.zeros([ROWS], dtype=tl.float32)
        for i in range(num_rolls):
            partners = load_factors(x, source, cols, width - tl.load(rolls + i), inside, width, RELU)
            products = factors * partners
            squares += tl.sum(products * products, 1)
        ratio = tl.sqrt(tl.sum(channels * channels, 1)) / (tl.sqrt(squares) + _SMALLEST_NORM)
    for i in range(num_rolls):
        partners = load_factors(x, source, cols, width - tl.load(rolls + i), inside, width, RELU)
        products = factors * partners * ratio[:, None]
        if HAS_GAIN:
            products *= load_gains(gain, (head * num_rolls + i) * width, cols, 0, width)[None, :]
        tl.store(out + target + (i + 1) * width, products.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_tokens"])
def narrow_kernel(
    x,
    gain,
    rolls,
    dwide,
    dx,
    partial,
    num_tokens,
    num_heads,
    width,
    num_rolls,
    HAS_GAIN: tl.constexpr,
    RELU: tl.constexpr,
    MATCH_NORM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program per ``ROWS`` tokens and head, whose sums of the gains' gradient it writes to a place of its own.

    Channel ``c`` is the first factor of product ``c`` of a block, and the second of product ``c + roll``. Scaled to the
    norm of ``x``, ``y = p |x| / (|p| + eps)``, products have the gradient
    ``dp = dy |x| / (|p| + eps) - p (dy . p) |x| / (|p| (|p| + eps)^2)``, and ``x`` gets
    ``x (dy . p) / (|x| (|p| + eps))``; a norm of zero has no gradient, as in PyTorch.
    """
    head = tl.program_id(1)
    rows, cols = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    inside = (rows < num_tokens)[:, None] & (cols < width)[None, :]
    source = (rows * num_heads + head) * width
    wide = source * (1 + num_rolls)
    channels = load_rolled(x, source, cols, 0, inside, width)
    factors = load_factors(x, source, cols, 0, inside, width, RELU)
    grads = load_rolled(dwide, wide, cols, 0, inside, width)
    ratio = tl.full([ROWS], 1.0, dtype=tl.float32)
    slope = tl.zeros([ROWS], dtype=tl.float32)
    if MATCH_NORM:
        squares, dots = tl.zeros([ROWS], dtype=tl.float32), tl.zeros([ROWS], dtype=tl.float32)
        for i in range(num_rolls):
            partners = load_factors(x, source, cols, width - tl.load(rolls + i), inside, width, RELU)
            products = factors * partners
            dscaled = load_rolled(dwide, wide + (i + 1) * width, cols, 0, inside, width)
            if HAS_GAIN:
                dscaled *= load_gains(gain, (head * num_rolls + i) * width, cols, 0, width)[None, :]
            squares += tl.sum(products * products, 1)
            dots += tl.sum(dscaled * products, 1)
        norm, size = tl.sqrt(tl.sum(channels * channels, 1)), tl.sqrt(squares)
        inverse = 1.0 / (size + _SMALLEST_NORM)
        ratio = norm * inverse
        slope = tl.where(size > 0, -dots * ratio * inverse / tl.where(size > 0, size, 1.0), 0.0)
        grads += tl.where(norm > 0, dots * inverse / tl.where(norm > 0, norm, 1.0), 0.0)[:, None] * channels
    dfactors = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for i in range(num_rolls):
        roll, block = tl.load(rolls + i), wide + (i + 1) * width
        before = load_factors(x, source, cols, width - roll, inside, width, RELU)
        after = load_factors(x, source, cols, roll, inside, width, RELU)
        dproducts = load_rolled(dwide, block, cols, 0, inside, width)
        dproducts_after = load_rolled(dwide, block, cols, roll, inside, width)
        if HAS_GAIN:
            first = (head * num_rolls + i) * width
            sums = tl.sum(dproducts * factors * before * ratio[:, None], 0)
            place = (tl.program_id(0).to(tl.int64) * num_heads * num_rolls * width) + first + cols
            tl.store(partial + place, sums, mask=cols < width)
            dproducts *= load_gains(gain, first, cols, 0, width)[None, :]
            dproducts_after *= load_gains(gain, first, cols, roll, width)[None, :]
        dfactors += (dproducts * ratio[:, None] + slope[:, None] * factors * before) * before
        dfactors += (dproducts_after * ratio[:, None] + slope[:, None] * factors * after) * after
    if RELU:
        dfactors = tl.where(channels > 0, dfactors, 0.0)
    target = source[:, None] + cols[None, :]
    tl.store(dx + target, (grads + dfactors).to(dx.dtype.element_ty), mask=inside)


def widen(x: torch.Tensor, features: Features, *, gain: bool) -> torch.Tensor:
    """Run :func:`statex_dist.ops.gla.triton.reference.widen` in Triton."""
    tokens, heads, width = x.shape
    out = x.new_empty(tokens, heads, width * features.map.factor)
    constants = _constants(x, features, gain=gain)
    rolls = _roll_tensor(tuple(roll % width for roll in features.map.rolls), x.device)
    grid = triton.cdiv(tokens, constants["ROWS"]), heads
    widen_kernel[grid](x, features.gain, rolls, out, tokens, heads, width, len(rolls), **constants, num_warps=4)
    return out


def narrow(
    x: torch.Tensor, dwide: torch.Tensor, features: Features, out: torch.Tensor, *, gain: bool
) -> torch.Tensor | None:
    """Run :func:`statex_dist.ops.gla.triton.reference.narrow` in Triton."""
    tokens, heads, width = x.shape
    constants = _constants(x, features, gain=gain)
    rolls = _roll_tensor(tuple(roll % width for roll in features.map.rolls), x.device)
    grid = triton.cdiv(tokens, constants["ROWS"]), heads
    partial = features.gain.new_empty(grid[0], *features.gain.shape) if gain else None
    tensors = x, features.gain, rolls, dwide, out, partial
    narrow_kernel[grid](*tensors, tokens, heads, width, len(rolls), **constants, num_warps=8)
    return None if partial is None else partial.sum(0)


def _constants(x: torch.Tensor, features: Features, *, gain: bool) -> dict[str, int]:
    columns = triton.next_power_of_2(x.shape[-1])
    tile = {"ROWS": max(_TILE // columns, 1), "COLUMNS": columns}
    return {"HAS_GAIN": gain, "RELU": features.map.relu, "MATCH_NORM": features.map.match_norm, **tile}


@lru_cache(maxsize=64)
def _roll_tensor(rolls: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return index_tensor(np.asarray(rolls, dtype=np.int32), device)
