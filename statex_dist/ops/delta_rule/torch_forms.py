"""The gated delta rule in PyTorch: token by token (the oracle), one step of decoding, and chunk by chunk.

    S_t = (I - b_t k_t k_t^T) diag(a_t) S_{t-1} + b_t k_t v_t^T,     o_t = s S_t^T q_t

with one decay per head (Gated DeltaNet, arXiv 2412.06464) or per key channel (KDA, arXiv 2510.26692). Inside a chunk of
``C`` tokens, with ``b`` the cumulative log decay and ``h`` the state at its start, the writes are the solution of a
triangular system (the WY form of arXiv 2406.06484):

    L[t, u] = beta_t sum_c k_tc k_uc exp(b_tc - b_uc)   for u < t
    n = (I + L)^-1 (beta v - beta k e^b h)
    o = A n + (q e^b) h,   h' = e^{b_C} h + (k e^{b_C - b})^T n

Shapes, packing and dtypes are those of :mod:`statex_dist.ops.gla.torch_forms`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from statex_dist.ops.chunk_groups import ChunkRun
from statex_dist.ops.cu_seqlens import at_least_fp32, power_of_two_layout
from statex_dist.ops.features import (
    Features,
    decay_rows,
    decayed,
    delta_keys,
    delta_products,
    join_sum,
    repeated_decays,
    state_blocks,
    widened_delta,
)
from statex_dist.ops.gla.torch_forms import decayed_products, read_rows, row_product
from statex_dist.ops.head_mixing import mix_outputs, spread_values
from statex_dist.ops.token_steps import scan_tokens, step_in_blocks


def delta_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    *,
    scale: float,
    projected: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advance the gated delta rule by one token.

    Args:
        q: ``[B, H, K]`` queries.
        k: ``[B, H, K]`` keys.
        v: ``[B, HV, V]`` values, ``HV`` a multiple of ``H``.
        g: ``[B, HV, 1]`` or ``[B, HV, K]`` log decays, at most 0.
        beta: ``[B, HV]`` strengths of the write.
        state: ``[B, HV, K, V]``.
        scale: Factor of the queries.
        projected: As for :func:`statex_dist.ops.gla.torch_forms.gla_step`.

    Returns:
        Output ``[B, HV, V]`` and the new state.
    """
    out_dtype = v.dtype
    q, k, v, g, beta = (y.to(state.dtype) for y in (q, k, v, g, beta))
    q, k = (y.repeat_interleave(v.shape[1] // y.shape[1], dim=1) for y in (q, k))
    state = state * g.exp().unsqueeze(-1)
    write = beta.unsqueeze(-1) * (v - read_rows(k, state, projected))
    state = state + k.unsqueeze(-1) * write.unsqueeze(-2)
    return read_rows(q * scale, state, projected).to(out_dtype), state


def delta_step_(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    *,
    scale: float,
    projected: int | None = None,
) -> torch.Tensor:
    """Run :func:`delta_step` over a contiguous ``state``, which it overwrites; return the output ``[B, HV, V]``."""
    out_dtype, shape = v.dtype, v.shape
    q, k = (y.repeat_interleave(v.shape[1] // y.shape[1], dim=1) for y in (q * scale, k))
    q, k, v, g, beta = (y.to(state.dtype).flatten(0, 1) for y in (q, k, v, g, beta))

    def advance(heads: torch.Tensor, decay, k, v, q, beta) -> torch.Tensor:
        heads.mul_(decay)
        heads.addcmul_(k.mT, beta * (v - row_product(k, heads, projected)))
        return row_product(q, heads, projected)

    inputs = g.exp().unsqueeze(-1), k.unsqueeze(-2), v.unsqueeze(-2), q.unsqueeze(-2), beta[:, None, None]
    return step_in_blocks(advance, state, inputs).view(shape).to(out_dtype)


def delta_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    *,
    scale: float | None = None,
    mix: torch.Tensor | None = None,
    features: Features | None = None,
    overwrite: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advance ``delta_rule`` by one token: arguments without their ``T``, ``state [B, HV, K, r V]``.

    With ``overwrite`` the new state takes the old one's place in memory: without autograd, and if the caller owns it.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    in_place = overwrite and state.is_contiguous()
    projected = None
    if features is not None:
        projected = q.shape[-1]
        g = repeated_decays(g, projected, features)
        added_q, added_k, factor = delta_products(q, k, features)
        k = torch.cat([k.to(factor.dtype) * factor, added_k], dim=-1)
        if in_place:
            q, added_q, scale = q * scale, added_q * scale, 1.0
        q = torch.cat([q.to(added_q.dtype), added_q], dim=-1)
    if mix is not None:
        v = spread_values(v, mix.shape[1])
    if in_place:
        o = delta_step_(q, k, v, g, beta, state, scale=scale, projected=projected)
    else:
        o, state = delta_step(q, k, v, g, beta, state, scale=scale, projected=projected)
    return (o if mix is None else mix_outputs(o, mix)), state


def naive_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    scale: float,
    features: Features | None = None,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run :func:`delta_step` token by token: the oracle of the chunked form and of the kernels.

    Args:
        q: ``[B, T, H, K]``, as all others with ``T`` tokens.
        k: Keys.
        v: Values.
        g: Log decays.
        beta: Strengths of the writes.
        scale: Factor of the queries.
        features: Products that are key channels of the state too, or None.
        initial_state: ``[S, HV, K, V]``, zero where None.
        cu_seqlens: ``[S + 1]`` borders of packed sequences; ``B`` must be 1.

    Returns:
        Output ``[B, T, HV, V]`` and final states ``[S, HV, K, V]``.
    """
    projected = None
    if features is not None:
        projected = q.shape[-1]
        q, k, v, g, beta = widened_delta((at_least_fp32(q), at_least_fp32(k), v, g, beta), features)
    state_shape = (v.shape[2], q.shape[3], v.shape[3])
    step = partial(delta_step, scale=scale, projected=projected)
    return scan_tokens(step, (q, k, v, g, beta), v, state_shape, initial_state=initial_state, cu_seqlens=cu_seqlens)


def chunked_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | Sequence[torch.Tensor],
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    scale: float,
    features: Features | None = None,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    chunk_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the gated delta rule chunk by chunk. Arguments and results are those of :func:`naive_delta_rule`.

    Args:
        v: Values, or several tensors that stand side by side (:func:`statex_dist.ops.gla.torch_forms.chunked_gla`).
        chunk_size: Tokens per chunk, a power of two from 4; None picks one by the sequences' lengths.

    Raises:
        ConfigError: ``chunk_size`` is not a power of two from 4.
    """
    layout = power_of_two_layout(q, cu_seqlens, chunk_size)
    repeats = g.shape[2] // q.shape[2]
    blocks = state_blocks(q.shape[-1], features)
    if features is None:
        q = q * scale
    else:
        features = features.repeated(repeats).of_chunks()  # of the queries as they are
    q, k = (y.repeat_interleave(repeats, dim=2) for y in (q, k))
    body = partial(_delta_chunks, scale=scale, features=features)
    inputs = q, k, g, beta.unsqueeze(-1)
    return layout.scan_values(body, inputs, v, initial_state, blocks)


def _delta_chunks(
    run: ChunkRun,
    chunks: Sequence[torch.Tensor],
    states: Sequence[torch.Tensor],
    *,
    scale: float,
    features: Features | None,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Run a group of chunks ``q, k, g, beta`` and values, from the states of each value's blocks of rows.

    Queries are scaled where there are no features.
    """
    q, k, g, beta, *values = chunks
    wide, added = torch.promote_types(q.dtype, torch.float32), None
    if features is not None:
        added_q, added_k, factor = delta_products(q, k, features)
        added, q, k = (added_q * scale, added_k), q * scale, k.to(wide) * factor
    q, k, g, beta = (y.to(wide) for y in (q, k, g, beta))
    b = g.cumsum(dim=2)
    total = b[:, :, -1:]
    pairs = [(q, k)] if added is None else [(q, k), added]
    inverse = _inverse([k for _, k in pairs], b, beta)
    attention = decayed_products(q, k, b, added)
    blocks = [_rows(q, k, b, total, beta * k, inverse) for q, k in pairs]

    def step(states: Sequence[torch.Tensor], write, attention, *rows: torch.Tensor):
        parts = [rows[i : i + 4] for i in range(0, len(rows), 4)]
        new = write
        for (erase, _, _, _), state in zip(parts, states, strict=True):
            new = new - erase @ state
        after = [S * decay + keys.transpose(-1, -2) @ new for (_, _, keys, decay), S in zip(parts, states, strict=True)]
        output = attention @ new
        for (_, queries, _, _), state in zip(parts, states, strict=True):
            output = output + queries @ state
        return after, output

    outputs, finals = [], []
    for i, value in enumerate(values):
        value = value.to(wide)
        first = states[i * len(blocks) : (i + 1) * len(blocks)]
        per_chunk = inverse @ (beta * value), attention, *(y for block in blocks for y in block)
        output, final = run.scan(step, first, *per_chunk)
        outputs.append(value if output is None else output)
        finals.extend(final)
    return outputs, finals


def _inverse(keys: Sequence[torch.Tensor], b: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """Return ``(I + L)^-1 [num_chunks, HV, C, C]`` of the blocks of key channels."""
    k, size = keys[0], keys[0].shape[2]
    identity = torch.eye(size, dtype=k.dtype, device=k.device)
    added = None if len(keys) == 1 else (keys[1], keys[1])
    system = identity + (beta * decayed_products(k, k, b, added)).tril(-1)
    return torch.linalg.solve_triangular(system, identity, upper=False, unitriangular=True)


def _rows(
    q: torch.Tensor,
    k: torch.Tensor,
    b: torch.Tensor,
    total: torch.Tensor,
    strength: torch.Tensor,
    inverse: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Return for a block of a state's rows: what a chunk erases, what it reads, its keys and its decay.

    ``strength`` is ``beta k``.
    """
    erase = inverse @ decayed(strength, b.exp())
    queries, keys, decay = decayed(q, b.exp()), decayed(k, (total - b).exp()), total.transpose(-1, -2).exp()
    return erase, queries, keys, decay_rows(decay, k.shape[-1])


def delta_transition(
    k: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, features: Features, dtype: torch.dtype
) -> torch.Tensor:
    """Return the matrix ``[1, HV, (1 + n) K, (1 + n) K]`` by which one sequence multiplies a state with products.

    It is the final state of a scan without values from the identity. That scan's outputs would be as wide as the state
    has rows, so they are not computed.

    Args:
        k: ``[1, T, H, K]`` keys; ``g`` and ``beta`` are those of :func:`naive_delta_rule`.
        features: The products.
        dtype: Of the matrix.
    """
    layout = power_of_two_layout(k, None, None)
    heads, repeats, sizes = g.shape[2], g.shape[2] // k.shape[2], state_blocks(k.shape[-1], features)
    rows = sum(sizes)
    identity = torch.eye(rows, dtype=dtype, device=k.device).expand(1, heads, rows, rows)
    body = partial(_transition_chunks, dtype=dtype, features=features.repeated(repeats).of_chunks())
    chunks = [layout.to_chunks(y) for y in (k.repeat_interleave(repeats, dim=2), g, beta.unsqueeze(-1))]
    chunk_bytes = heads * rows * (2 * layout.chunk_size + rows) * dtype.itemsize
    _, finals = layout.run_chunks(body, chunks, identity.split(list(sizes), dim=-2), chunk_bytes)
    return torch.cat(finals, dim=-2)


def _transition_chunks(
    run: ChunkRun,
    chunks: Sequence[torch.Tensor],
    states: Sequence[torch.Tensor],
    *,
    dtype: torch.dtype,
    features: Features,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Run chunks ``k, g, beta`` without values; there are no outputs."""
    k, g, beta = (y.to(dtype) for y in chunks)
    added, factor = delta_keys(chunks[0], features)
    b, keys = g.cumsum(dim=2), [k * factor, added]
    inverse = _inverse(keys, b, beta)
    total = b[:, :, -1:]
    to_end, decay = (total - b).exp(), total.transpose(-1, -2).exp()
    blocks = [(inverse @ decayed(beta * y, b.exp()), decayed(y, to_end), decay_rows(decay, y.shape[-1])) for y in keys]

    def step(states: Sequence[torch.Tensor], *rows: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        parts = [rows[i : i + 3] for i in range(0, len(rows), 3)]
        erased = join_sum([erase @ state for (erase, _, _), state in zip(parts, states, strict=True)])
        after = [S * decay - keys.mT @ erased for (_, keys, decay), S in zip(parts, states, strict=True)]
        return after, erased.new_zeros(len(erased), 0)

    _, finals = run.scan(step, states, *(y for block in blocks for y in block))
    return [], finals
