"""Gated linear attention for large states: one autograd function around batched products and elementwise kernels.

By a count of bytes and FLOPs (benchmarks/gpu/cost.py), fla's ``chunk_gla`` on a merged head is bound by the memory
traffic of its chunk states, which it keeps in fp32 every 64 tokens. Here chunks are long (``C`` = 256 tokens), chunk
states are bf16 with an fp32 carry, every product is one batched GEMM, and what Triton does is elementwise or small
(:mod:`gates`, :mod:`scores`, :mod:`carry`). With ``b`` the cumulative log decay inside a chunk and ``h`` the state at
its start (docs/method.md, section 3):

    pre-gate         q~ = s q e^b,  k~ = k e^{b_C - b}                       once per chunk and head
    scores           A[t, u] = s sum_c q_tc k_uc exp(b_tc - b_uc), u <= t    one C x C matrix per head
    update           u = (k~)^T v                                            batched product
    carry            h' = e^{b_C} h + u                                      h takes the place of u
    output           o = A v + q~ h                                          batched products

A mixed layer (``mix [H, r]``) stores ``r`` value heads per key head and reads
``o_j = sum_i M_ij (A_i v_j + q~_i h_ij)``, ``i`` over the key heads that store head ``j``'s values: the C x C matrices
are summed over heads before they meet the values (docs/method.md, section 4).

Products of keys and queries as further channels (:mod:`statex_dist.ops.features`) are made of one segment at a time
(:mod:`features`), and so are the gradients of the wide tensors; log decays stay those of the ``K`` projected channels.
Old channels and products are multiplied apart, so that products without a gain add exact zeros.

Memory is bounded: chunks are processed in segments whose states fit ``max_state_bytes``; the
backward pass computes each segment's states again from the fp32 state before it.
"""

from __future__ import annotations

import math
import os
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from statex_dist.errors import ConfigError
from statex_dist.ops.cu_seqlens import power_of_two_chunks, sequence_lengths
from statex_dist.ops.features import Features
from statex_dist.ops.gla.triton import reference
from statex_dist.ops.gla.triton.products import inner_products, outer_products, products
from statex_dist.ops.gla.triton.segments import Segment, cut_segments
from statex_dist.ops.head_mixing import gather_blocks, mix_blocks, mix_scores, spread, unmix_scores, weigh_blocks
from statex_dist.state.geometry import CHUNK_SIZE, MAX_STATE_BYTES, FeatureMap, chunks_per_segment

SMALLEST_CHUNK = 16
CHUNK_SIZES = (CHUNK_SIZE, 128, 64, 32, SMALLEST_CHUNK)
GRID_PROGRAMS = 65535
"""Programs along the second axis of a CUDA grid, which counts a segment's chunks."""


class _Pieces(NamedTuple):
    """Where the elementwise parts are computed: in Triton, or in PyTorch."""

    features: ModuleType
    gates: ModuleType
    scores: ModuleType
    carry: ModuleType


def _pieces(q: torch.Tensor) -> _Pieces:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if q.dtype == torch.float64 or not (q.is_cuda or interpreted):
        return _Pieces(reference, reference, reference, reference)
    # Not at the top: triton is not needed on a CPU, and reads its environment when it is first imported.
    from statex_dist.ops.gla.triton import carry, features, gates, scores

    return _Pieces(features, gates, scores, carry)


def expanded_gla(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    *,
    scale: float,
    mix: torch.Tensor | None = None,
    features: Features | None = None,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    chunk_size: int | None = None,
    max_state_bytes: int | None = None,
    output_final_state: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run gated linear attention, plain, merged or mixed, with bounded memory for the states.

    Arguments and results are those of :func:`statex_dist.ops.gla.gla`, with these limits:

    Args:
        q: fp32 or bf16 (float64 too, in PyTorch).
        g: Finite and at most 0.
        features: Products as further channels, which the states have too; not together with ``mix``.
        chunk_size: Tokens per chunk, a power of two from 16; None picks 256, or less for short sequences.
        max_state_bytes: Bound of the chunk states held at once, of the forward pass and their gradients together; None
            for 256 MiB. Those of the square root of all chunks are held in any case.

    Raises:
        ConfigError: ``chunk_size`` or ``max_state_bytes`` is not allowed, the dtype is not supported, or both
            ``features`` and ``mix`` are given.
        ValueError: ``initial_state`` or ``cu_seqlens`` does not fit the tokens, or gains do not fit the heads.
    """
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float64):
        raise ConfigError(f"scan backend 'triton' computes in fp32 or bf16, not {str(q.dtype).removeprefix('torch.')}")
    lengths = sequence_lengths(q.shape[0], q.shape[1], cu_seqlens)
    chunk_size = power_of_two_chunks(lengths, chunk_size, smallest=SMALLEST_CHUNK, sizes=CHUNK_SIZES)
    max_state_bytes = MAX_STATE_BYTES if max_state_bytes is None else max_state_bytes
    if max_state_bytes < 1:
        raise ConfigError(f"max_state_bytes must be 1 or more, not {max_state_bytes}")
    keys = q.shape[3]
    if features is not None:
        if mix is not None:
            raise ConfigError("scan backend 'triton' computes mixed heads or features, not both in one layer")
        gains = (q.shape[2], len(features.map.rolls) * keys)
        if features.gain.shape != gains:
            raise ValueError(f"gains of features must be {gains}, not {tuple(features.gain.shape)}")
        keys *= features.map.factor
    partners = 1 if mix is None else mix.shape[1]
    state_shape = (len(lengths), q.shape[2], keys, v.shape[3] * partners)
    if initial_state is not None and initial_state.shape != state_shape:
        raise ValueError(f"initial_state must be {state_shape}, not {tuple(initial_state.shape)}")
    num_chunks = sum(-(-length // chunk_size) for length in lengths)
    state_bytes = math.prod(state_shape[1:]) * q.element_size()
    per_segment = min(chunks_per_segment(num_chunks, state_bytes, max_state_bytes), GRID_PROGRAMS)
    inputs: list[torch.Tensor | None] = [x.flatten(0, 1).contiguous() for x in (q, k, v.to(q.dtype), g)]
    inputs += [
        None if x is None else x.to(torch.promote_types(q.dtype, torch.float32)).contiguous()
        for x in (mix, initial_state, None if features is None else features.gain)
    ]
    settings = _Settings(
        scale=scale,
        features=None if features is None else features.map,
        segments=cut_segments(lengths, chunk_size, per_segment, q.device),
        state_shape=state_shape,
        output_final_state=output_final_state,
        # A Function sees which tensors could have gradients, not whether any is wanted.
        keep_states=torch.is_grad_enabled(),
    )
    # Triton launches on the current device, wherever its tensors are.
    with torch.cuda.device_of(q), torch.autocast(q.device.type, enabled=False):
        o, final = _ExpandedGLA.apply(*inputs, settings)
    return o.to(v.dtype).unflatten(0, q.shape[:2]), final


class _Settings(NamedTuple):
    """The arguments of a scan beside its tensors; ``state_shape`` is ``(S, H, K, r V)``."""

    scale: float
    features: FeatureMap | None
    segments: tuple[Segment, ...]
    state_shape: tuple[int, int, int, int]
    output_final_state: bool
    keep_states: bool


class _ExpandedGLA(torch.autograd.Function):
    """Segments in order, and in reverse order for the gradient."""

    @staticmethod
    def forward(ctx: Any, q, k, v, g, mix, initial, gain, settings: _Settings):
        tensors, pieces = (q, k, v, g, mix, initial, gain), _pieces(q)
        final = None
        if settings.output_final_state:
            final = _zero_states(q, settings.state_shape) if initial is None else initial.clone()
        o = torch.empty_like(v)
        carried = _zero_states(q, settings.state_shape[1:])
        keep, befores = settings.keep_states and any(ctx.needs_input_grad), []
        for segment in settings.segments:
            if keep:
                befores.append(carried.clone())
            _run_segment(pieces, tensors, carried, final, o, settings, segment)
        ctx.save_for_backward(*tensors, *befores)
        ctx.set_materialize_grads(False)
        ctx.settings = settings
        return o, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do, dfinal):
        q, k, v, g, mix, initial, gain, *befores = ctx.saved_tensors
        settings, pieces = ctx.settings, _pieces(q)
        do = torch.zeros_like(v) if do is None else do.contiguous()
        if dfinal is not None:
            dfinal = dfinal.to(torch.promote_types(q.dtype, torch.float32)).contiguous()
        dq, dk, dv, dg = (torch.empty_like(x) for x in (q, k, v, g))
        dinitial = None
        if ctx.needs_input_grad[5]:  # an empty sequence hands its gradient through
            dinitial = torch.zeros_like(initial) if dfinal is None else dfinal.clone()
        dmix, dgain = (None if x is None else torch.zeros_like(x) for x in (mix, gain))
        carried = _zero_states(q, settings.state_shape[1:])
        with torch.autocast(q.device.type, enabled=False):
            for segment, before in zip(reversed(settings.segments), reversed(befores), strict=True):
                _run_segment_back(
                    pieces,
                    (q, k, v, g, mix, initial, gain),
                    before.clone(),  # it is advanced in place, and a second backward pass may follow
                    carried,
                    (do, dfinal),
                    (dq, dk, dv, dg, dmix, dinitial, dgain),
                    settings,
                    segment,
                )
        return dq, dk, dv, dg, dmix, dinitial, dgain, None


def _zero_states(like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    return like.new_zeros(shape, dtype=torch.promote_types(like.dtype, torch.float32))


# Separate functions, so that a segment's tensors are freed before those of the next one are allocated.


def _run_segment(pieces: _Pieces, tensors, carried, final, o, settings: _Settings, segment: Segment) -> None:
    """Advance the states over a segment and write its outputs."""
    *inputs, gain = tensors
    if gain is not None:
        assert settings.features is not None
        inputs = _widened(pieces, inputs, Features(settings.features, gain), segment)
        o, segment = segment.own(o), segment.alone
    _scan_segment(pieces, inputs, carried, final, o, settings.scale, segment)


def _run_segment_back(
    pieces: _Pieces, tensors, before, carried, grads_of_outputs, grads_of_inputs, settings: _Settings, segment: Segment
) -> None:
    """Carry the gradient of the states back over a segment and write the gradients of its inputs."""
    *inputs, gain = tensors
    *outs, dgain = grads_of_inputs
    if gain is None:
        _scan_segment_back(pieces, inputs, before, carried, grads_of_outputs, outs, settings.scale, segment)
        return
    assert settings.features is not None
    features = Features(settings.features, gain)
    (q, k), (dq, dk, dv, dg) = (tuple(segment.own(x) for x in part) for part in (inputs[:2], outs[:4]))
    wide = _widened(pieces, inputs, features, segment)
    dwide = [torch.empty_like(x) for x in wide[:2]]
    do, dfinal = grads_of_outputs
    grads = (segment.own(do), dfinal), (*dwide, dv, dg, *outs[4:])
    _scan_segment_back(pieces, wide, before, carried, *grads, settings.scale, segment.alone)
    dgain += pieces.features.narrow(q, dwide[0], features, dq, gain=True)
    pieces.features.narrow(k, dwide[1], features, dk, gain=False)


def _widened(pieces: _Pieces, tensors, features: Features, segment: Segment):
    """Return the tensors of a segment's tokens alone, products as further channels of queries and keys."""
    q, k, v, g = (segment.own(x) for x in tensors[:4])
    widen = pieces.features.widen
    return widen(q, features, gain=True), widen(k, features, gain=False), v, g, *tensors[4:]


def _scan_segment(pieces: _Pieces, tensors, carried, final, o, scale: float, segment: Segment) -> None:
    """Run :func:`_run_segment` without features; log decays that are fewer than channels repeat."""
    mix = tensors[4]
    part = _Part.compute(pieces, tensors, carried, final, scale, segment)
    read = mix_blocks(inner_products(part.queries, part.starts, part.old), mix)
    _put_sum(read, mix_scores(part.scores, mix), part.values, segment, o)


def _scan_segment_back(
    pieces: _Pieces, tensors, before, carried, grads_of_outputs, grads_of_inputs, scale: float, segment: Segment
) -> None:
    """Run :func:`_run_segment_back` without features."""
    q, k, _, _, mix, _ = tensors
    do, dfinal = grads_of_outputs
    dq, dk, dv, dg, dmix, dinitial = grads_of_inputs
    part = _Part.compute(pieces, tensors, before, None, scale, segment)
    do_part = segment.take(do)
    do_spread = spread(do_part, mix)
    dscores, dmix_scores = unmix_scores(products(do_part, part.values.mT), part.scores, mix)
    dqueries = products(weigh_blocks(do_spread, mix), part.starts.mT)
    # Gradient of the states at the chunks' starts, from the reads; the carry replaces it with the one at their ends.
    dstates = outer_products(part.queries, do_spread, part.old)
    dtotal, dmix_states = pieces.carry.carry_gradients(
        part.total, part.starts, dstates, mix, carried, dfinal, dinitial, segment
    )
    if dmix is not None:
        dmix += dmix_scores + dmix_states
    dv_part = gather_blocks(inner_products(part.keys, dstates, part.old), mix)
    _put_sum(dv_part, mix_scores(part.scores, mix).mT, do_part, segment, dv)
    dkeys = products(part.spread, dstates.mT)
    pieces.scores.input_gradients(q, k, part.decays, dscores, dqueries, dkeys, dtotal, segment, scale, (dq, dk, dg))


class _Part(NamedTuple):
    """What forward and backward pass both need of a segment.

    Attributes:
        old: Channels that are not products; ``K`` counts both.
        decays: What the pieces themselves hand on (see ``pregate``).
        queries: ``[H, n, C, K]`` gated queries.
        keys: ``[H, n, C, K]`` gated keys.
        total: ``[H, n, K]`` log decays of the chunks.
        scores: ``[H, n, C, C]``, one matrix per key head.
        values: ``[H, n, C, V]``.
        spread: ``[H, n, C, r V]`` values that each key head stores.
        starts: ``[H, n, K, r V]`` states before the chunks.
    """

    old: int
    decays: torch.Tensor
    queries: torch.Tensor
    keys: torch.Tensor
    total: torch.Tensor
    scores: torch.Tensor
    values: torch.Tensor
    spread: torch.Tensor
    starts: torch.Tensor

    @classmethod
    def compute(cls, pieces: _Pieces, tensors, carried, final, scale: float, segment: Segment) -> _Part:
        """Compute them, and advance ``carried`` from the state before the segment to the one after it."""
        q, k, v, g, mix, initial = tensors
        decays, queries, keys, total = pieces.gates.pregate(q, k, g, segment, scale)
        scores = pieces.scores.scores(q, k, decays, segment, scale)
        values = segment.take(v)
        stored = spread(values, mix)
        states = outer_products(keys, stored, g.shape[-1])
        pieces.carry.carry_states(total, states, carried, initial, final, segment)  # from what chunks add to starts
        return cls(g.shape[-1], decays, queries, keys, total, scores, values, stored, states)


def _put_sum(base: torch.Tensor, x: torch.Tensor, y: torch.Tensor, segment: Segment, out: torch.Tensor) -> None:
    """Write ``base + x @ y`` to the segment's tokens, at once where they are laid out like the product."""
    operands = base.flatten(0, 1), x.flatten(0, 1), y.flatten(0, 1)
    if segment.is_full and base.shape[0] == 1:
        torch.baddbmm(*operands, out=segment.take(out).flatten(0, 1))
    else:
        segment.put(torch.baddbmm(*operands).unflatten(0, base.shape[:2]), out)
