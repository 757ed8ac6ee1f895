"""Gated linear attention for large states: one autograd function around batched products and elementwise kernels.

fla's ``chunk_gla`` on a merged head is bound by the memory traffic of its chunk states, which it keeps in fp32 every 64
tokens. Here chunks are long (256 tokens), chunk states are bf16 with an fp32 carry, every product is one batched GEMM,
and what Triton does is elementwise or small (kernel groups: :mod:`gates`, :mod:`scores`, :mod:`carry`):

    pre-gate         q~ = s q e^b,  k^ = k e^{b_C - b}                       once per chunk and head
    scores           A[t, u] = s sum_c q_tc k_uc exp(b_tc - b_uc), u <= t    one C x C matrix per head
    update           dS = k^T v                                              batched product
    carry            h_{n+1} = e^{b_C} h_n + dS_n                            in place
    output           o = A v + q~ h                                          batched products

A mixed layer (``mix [H, r]``) stores ``r`` value heads per key head and reads
``o_j = sum_i M_ij (A_i v_j + q~_i h_ij)``: the C x C matrices are summed over heads before they meet the values
(docs/method.md, section 3).

Memory is bounded whatever the length: chunks are processed in segments whose states fit ``max_state_bytes``; the
backward pass computes each segment's states again from the fp32 state before it.
"""

from __future__ import annotations

import os
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from statex_dist.errors import ConfigError
from statex_dist.ops.chunk_layout import sequence_lengths
from statex_dist.ops.precision import wide_dtype
from statex_dist.ops.triton import reference
from statex_dist.ops.triton.segments import Segment, cut_segments

CHUNK_SIZE = 256
"""Tokens per chunk of long sequences: from about 192 on, an H200 is bound by compute and not by the states' traffic."""
SMALLEST_CHUNK = 16
MAX_STATE_BYTES = 512 * 2**20
"""Chunk states held at once, those of the forward pass and their gradients together."""
GRID_PROGRAMS = 65535
"""Programs along the second axis of a CUDA grid, which counts a segment's chunks."""
_LARGEST_FILL = 0.25


class _Pieces(NamedTuple):
    """Where the elementwise parts are computed: in Triton, or in PyTorch."""

    gates: ModuleType
    scores: ModuleType
    carry: ModuleType


def _pieces(q: torch.Tensor) -> _Pieces:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if q.dtype == torch.float64 or not (q.is_cuda or interpreted):
        return _Pieces(reference, reference, reference)
    # Not at the top: triton is not needed on a CPU, and reads its environment when it is first imported.
    from statex_dist.ops.triton import carry, gates, scores

    return _Pieces(gates, scores, carry)


def expanded_gla(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    *,
    scale: float,
    mix: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    chunk_size: int | None = None,
    max_state_bytes: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run gated linear attention, plain, merged or mixed, with bounded memory for the states.

    Args:
        q: ``[B, T, H, K]`` queries, fp32 or bf16 (float64 too, in PyTorch).
        k: ``[B, T, H, K]`` keys.
        v: ``[B, T, H, V]`` values.
        g: ``[B, T, H, K]`` log decays, at most 0; any size of them is exact.
        scale: Factor of the queries.
        mix: ``[H, r]`` mixing matrix, or None.
        initial_state: ``[S, H, K, r V]``, or None for zero.
        cu_seqlens: ``[S + 1]`` borders of packed sequences; ``B`` must be 1.
        chunk_size: Tokens per chunk, a power of two from 16; None picks 256, or less for short sequences.
        max_state_bytes: Bound of the chunk states held at once (at least those of one chunk are); None for 512 MiB.

    Returns:
        Output ``[B, T, H, V]`` in ``v``'s dtype and final states ``[S, H, K, r V]`` in fp32 (float64 for float64).

    Raises:
        ConfigError: ``chunk_size`` or ``max_state_bytes`` is not allowed, or the dtype is not supported.
    """
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float64):
        raise ConfigError(f"scan backend 'triton' computes in fp32 or bf16, not {str(q.dtype).removeprefix('torch.')}")
    lengths = sequence_lengths(q.shape[0], q.shape[1], cu_seqlens)
    chunk_size = _fitting_chunk_size(lengths) if chunk_size is None else chunk_size
    if chunk_size < SMALLEST_CHUNK or chunk_size & (chunk_size - 1):
        raise ConfigError(f"chunk_size must be a power of two from {SMALLEST_CHUNK}, not {chunk_size}")
    max_state_bytes = MAX_STATE_BYTES if max_state_bytes is None else max_state_bytes
    if max_state_bytes < 1:
        raise ConfigError(f"max_state_bytes must be 1 or more, not {max_state_bytes}")
    partners = 1 if mix is None else mix.shape[1]
    state_bytes = q.shape[2] * q.shape[3] * v.shape[3] * partners * q.element_size()
    per_segment = min(max(1, max_state_bytes // (2 * state_bytes)), GRID_PROGRAMS)
    segments = cut_segments(lengths, chunk_size, per_segment, q.device)
    inputs = (x.flatten(0, 1).contiguous() for x in (q, k, v.to(q.dtype), g))
    wide = wide_dtype(q.dtype)
    initial = None if initial_state is None else initial_state.to(wide)
    if initial is not None:
        initial = initial.contiguous()
    with torch.cuda.device_of(q):  # Triton launches on the current device, wherever its tensors are
        o, final = _ExpandedGLA.apply(*inputs, mix, initial, scale, segments, len(lengths))
    return o.to(v.dtype).unflatten(0, q.shape[:2]), final


def _fitting_chunk_size(lengths: tuple[int, ...]) -> int:
    """Return the longest chunk whose empty places stay below a quarter of the tokens, or the shortest there is."""
    size = CHUNK_SIZE
    while size > SMALLEST_CHUNK:
        if sum(-(-length // size) * size for length in lengths) <= (1 + _LARGEST_FILL) * sum(lengths):
            return size
        size //= 2
    return size


class _ExpandedGLA(torch.autograd.Function):
    """Segments in order, and in reverse order for the gradient."""

    @staticmethod
    def forward(ctx: Any, q, k, v, g, mix, initial, scale: float, segments: tuple[Segment, ...], num_sequences: int):
        wide = wide_dtype(q.dtype)
        heads, values = v.shape[1:]
        state_shape = (heads, q.shape[2], values * (1 if mix is None else mix.shape[1]))
        final = _first_states(initial, num_sequences, state_shape, q, wide).clone()
        o = torch.empty_like(v)
        carried = q.new_zeros(state_shape, dtype=wide)
        pieces, keep = _pieces(q), any(ctx.needs_input_grad)
        befores = []
        for segment in segments:
            if keep:
                befores.append(carried.clone())
            part = _Part.compute(pieces, q, k, v, g, mix, carried, initial, final, scale, segment)
            read = _mix_blocks(_products(part.queries, part.starts), mix)
            _put_sum(read, _mix_scores(part.scores, mix), part.values, segment, o)
        ctx.save_for_backward(q, k, v, g, mix, initial, *befores)
        ctx.scale, ctx.segments = scale, segments
        return o, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do, dfinal):
        q, k, v, g, mix, initial, *befores = ctx.saved_tensors
        pieces, wide = _pieces(q), wide_dtype(q.dtype)
        do, dfinal = do.contiguous(), dfinal.to(wide).contiguous()
        dq, dk, dv, dg = (torch.empty_like(x) for x in (q, k, v, g))
        dinitial = dfinal.clone() if ctx.needs_input_grad[5] else None  # an empty sequence hands its gradient through
        dmix = None if mix is None else torch.zeros_like(mix, dtype=wide)
        carried = q.new_zeros(dfinal.shape[1:], dtype=wide)
        for segment, before in zip(reversed(ctx.segments), reversed(befores), strict=True):
            part = _Part.compute(pieces, q, k, v, g, mix, before, initial, None, ctx.scale, segment)
            do_part = segment.take(do)
            do_spread = _spread(do_part, mix)
            dscores, dmix_scores = _unmix_scores(_products(do_part, part.values.mT), part.scores, mix)
            dqueries = _products(_weigh_blocks(do_spread, mix), part.starts.mT)
            grads = _products(part.queries.mT, do_spread)
            dtotal, dmix_states = pieces.carry.carry_gradients(
                part.total, part.starts, grads, mix, carried, dfinal, dinitial, segment
            )
            if dmix is not None:
                dmix += dmix_scores + dmix_states
            dv_part = _gather_blocks(_products(part.keys, grads), mix)
            _put_sum(dv_part, _mix_scores(part.scores, mix).mT, do_part, segment, dv)
            dkeys = _products(part.spread, grads.mT)
            pieces.scores.input_gradients(
                q, k, part.decays, dscores, dqueries, dkeys, dtotal, segment, ctx.scale, (dq, dk, dg)
            )
        return dq, dk, dv, dg, None if dmix is None else dmix.to(mix.dtype), dinitial, None, None, None


class _Part(NamedTuple):
    """What forward and backward pass both need of a segment.

    Attributes:
        decays: What the pieces themselves hand on (see ``pregate``).
        queries: ``[H, n, C, K]`` gated queries.
        keys: ``[H, n, C, K]`` gated keys.
        total: ``[H, n, K]`` log decays of the chunks.
        scores: ``[H, n, C, C]``, one matrix per key head.
        values: ``[H, n, C, V]``.
        spread: ``[H, n, C, r V]`` values that each key head stores.
        starts: ``[H, n, K, r V]`` states before the chunks.
    """

    decays: torch.Tensor
    queries: torch.Tensor
    keys: torch.Tensor
    total: torch.Tensor
    scores: torch.Tensor
    values: torch.Tensor
    spread: torch.Tensor
    starts: torch.Tensor

    @classmethod
    def compute(
        cls, pieces: _Pieces, q, k, v, g, mix, carried, initial, final, scale: float, segment: Segment
    ) -> _Part:
        decays, queries, keys, total = pieces.gates.pregate(q, k, g, segment, scale)
        scores = pieces.scores.scores(q, k, decays, segment, scale)
        values = segment.take(v)
        spread = _spread(values, mix)
        states = _products(keys.mT, spread)
        pieces.carry.carry_states(total, states, carried, initial, final, segment)
        return cls(decays, queries, keys, total, scores, values, spread, states)


def _first_states(initial, num_sequences: int, shape: tuple[int, ...], like: torch.Tensor, wide: torch.dtype):
    return like.new_zeros(num_sequences, *shape, dtype=wide) if initial is None else initial


def _products(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return ``x @ y`` of ``[H, n, ., .]`` tensors as one batched product."""
    return torch.bmm(x.flatten(0, 1), y.flatten(0, 1)).unflatten(0, x.shape[:2])


def _put_sum(base: torch.Tensor, x: torch.Tensor, y: torch.Tensor, segment: Segment, out: torch.Tensor) -> None:
    """Write ``base + x @ y`` to the segment's tokens, at once where they are laid out like the product."""
    operands = base.flatten(0, 1), x.flatten(0, 1), y.flatten(0, 1)
    if segment.is_full and base.shape[0] == 1:
        torch.baddbmm(*operands, out=segment.take(out).flatten(0, 1))
    else:
        segment.put(torch.baddbmm(*operands).unflatten(0, base.shape[:2]), out)


def _spread(x: torch.Tensor, mix: torch.Tensor | None) -> torch.Tensor:
    """Return ``[H, ..., r V]``: beside the values of head ``i`` those of heads ``i + 1, ..., i + r - 1``."""
    if mix is None:
        return x
    return torch.cat([x.roll(-s, dims=0) for s in range(mix.shape[1])], dim=-1)


def _weigh_blocks(x: torch.Tensor, mix: torch.Tensor | None) -> torch.Tensor:
    """Return ``x [H, n, C, r V]`` with block ``s`` of head ``i`` times ``mix[i, s]``."""
    if mix is None:
        return x
    return (x.unflatten(-1, (mix.shape[1], -1)) * mix.to(x.dtype)[:, None, None, :, None]).flatten(-2)


def _gather_blocks(x: torch.Tensor, mix: torch.Tensor | None) -> torch.Tensor:
    """Return ``[H, n, C, V]``, the sum of what is meant for each head: the transpose of :func:`_spread`."""
    if mix is None:
        return x
    return sum(block.roll(s, dims=0) for s, block in enumerate(x.chunk(mix.shape[1], dim=-1)))  # type: ignore[return-value]


def _mix_blocks(x: torch.Tensor, mix: torch.Tensor | None) -> torch.Tensor:
    """Return ``[H, n, C, V]``: what the output heads read of ``x [H, n, C, r V]``."""
    return _gather_blocks(_weigh_blocks(x, mix), mix)


def _mix_scores(scores: torch.Tensor, mix: torch.Tensor | None) -> torch.Tensor:
    """Return each output head's ``C x C`` matrix, the weighted sum of those of the key heads it reads."""
    if mix is None:
        return scores
    weights = mix.to(scores.dtype)[:, :, None, None, None].unbind(1)
    return sum((scores * weight).roll(s, dims=0) for s, weight in enumerate(weights))  # type: ignore[return-value]


def _unmix_scores(
    grad: torch.Tensor, scores: torch.Tensor, mix: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the gradients of ``scores`` and of ``mix`` from that of :func:`_mix_scores`."""
    if mix is None:
        return grad, None
    rolled = [grad.roll(-s, dims=0) for s in range(mix.shape[1])]
    weights = mix.to(scores.dtype)[:, :, None, None, None].unbind(1)
    wide = wide_dtype(scores.dtype)
    dmix = torch.stack([(scores.to(wide) * x).sum((1, 2, 3)) for x in rolled], dim=1)
    return sum(x * weight for x, weight in zip(rolled, weights, strict=True)), dmix  # type: ignore[return-value]
