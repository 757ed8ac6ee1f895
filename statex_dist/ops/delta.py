"""The gated delta rule: the recurrence token by token, and its chunked form in PyTorch.

    S_t = (I - b_t k_t k_t^T) diag(a_t) S_{t-1} + b_t k_t v_t^T,     o_t = s S_t^T q_t

with one decay per head (Gated DeltaNet, arXiv 2412.06464) or per key channel (KDA, arXiv 2510.26692). Inside a chunk of
``C`` tokens, with ``b`` the cumulative log decay and ``h`` the state at its start, the writes are the solution of a
triangular system (the WY form of arXiv 2406.06484):

    L[t, u] = beta_t sum_c k_tc k_uc exp(b_tc - b_uc)   for u < t
    n = (I + L)^-1 (beta v - beta k e^b h)
    o = A n + (q e^b) h,   h' = e^{b_C} h + (k e^{b_C - b})^T n

No exponent is positive, as in :mod:`statex_dist.ops.chunked`, whose products of decayed rows serve here too.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from statex_dist.ops.chunk_layout import chunk_layout
from statex_dist.ops.chunked import decayed_products, join_blocks, power_of_two_chunks
from statex_dist.ops.cu_seqlens import sequence_lengths
from statex_dist.ops.naive import first_state, over_sequences
from statex_dist.ops.precision import wide_dtype


def delta_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    *,
    scale: float,
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

    Returns:
        Output ``[B, HV, V]`` and the new state.
    """
    out_dtype = v.dtype
    q, k, v, g, beta = (y.to(state.dtype) for y in (q, k, v, g, beta))
    q, k = (y.repeat_interleave(v.shape[1] // y.shape[1], dim=1) for y in (q, k))
    state = state * g.exp().unsqueeze(-1)
    write = beta.unsqueeze(-1) * (v - torch.einsum("bhk,bhkv->bhv", k, state))
    state = state + k.unsqueeze(-1) * write.unsqueeze(-2)
    return torch.einsum("bhk,bhkv->bhv", q * scale, state).to(out_dtype), state


def naive_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    scale: float,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the gated delta rule token by token: the oracle of the chunked form and of the kernels.

    Args:
        q: ``[B, T, H, K]`` queries.
        k: ``[B, T, H, K]`` keys.
        v: ``[B, T, HV, V]`` values.
        g: ``[B, T, HV, 1]`` or ``[B, T, HV, K]`` log decays, at most 0.
        beta: ``[B, T, HV]`` strengths of the writes.
        scale: Factor of the queries.
        initial_state: ``[S, HV, K, V]``, zero where None.
        cu_seqlens: ``[S + 1]`` borders of packed sequences; ``B`` must be 1.

    Returns:
        Output ``[B, T, HV, V]`` and final states ``[S, HV, K, V]``.
    """
    if cu_seqlens is not None:
        scan = partial(naive_delta_rule, scale=scale)
        return over_sequences(scan, (q, k, v, g, beta), cu_seqlens, initial_state)
    state = first_state(initial_state, q, (q.shape[0], v.shape[2], q.shape[3], v.shape[3]))
    outputs = []
    tokens = zip(q.unbind(1), k.unbind(1), v.unbind(1), g.unbind(1), beta.unbind(1), strict=True)
    for q_t, k_t, v_t, g_t, beta_t in tokens:
        output, state = delta_step(q_t, k_t, v_t, g_t, beta_t, state, scale=scale)
        outputs.append(output)
    return torch.stack(outputs, dim=1) if outputs else v.new_zeros(v.shape), state


def chunked_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | Sequence[torch.Tensor],
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    scale: float,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    chunk_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the gated delta rule chunk by chunk. Arguments and results are those of :func:`naive_delta_rule`.

    Args:
        v: Values, or several tensors that stand side by side (:func:`statex_dist.ops.chunked.chunked_gla`).
        chunk_size: Tokens per chunk, a power of two from 4; None picks one by the sequences' lengths.

    Raises:
        ConfigError: ``chunk_size`` is not a power of two from 4.
    """
    values = [v] if isinstance(v, torch.Tensor) else list(v)
    batch, num_tokens, heads = values[0].shape[:3]
    lengths = sequence_lengths(batch, num_tokens, cu_seqlens)
    chunk_size = power_of_two_chunks(lengths, chunk_size)
    layout = chunk_layout(lengths, chunk_size, q.device)
    out_dtype, work_dtype = values[0].dtype, wide_dtype(q.dtype)
    q, k = (y.repeat_interleave(heads // y.shape[2], dim=2) for y in (q * scale, k))
    q, k, g = (layout.to_chunks(y).to(work_dtype) for y in (q, k, g))
    beta = layout.to_chunks(beta.unsqueeze(-1)).to(work_dtype)
    b = g.cumsum(dim=2)
    total = b[:, :, -1:]
    identity = torch.eye(chunk_size, dtype=work_dtype, device=q.device)
    system = identity + (beta * _products(k, k, b)).tril(-1)
    inverse = torch.linalg.solve_triangular(system, identity, upper=False, unitriangular=True)
    attention, erase = _products(q, k, b), inverse @ (beta * k * b.exp())
    queries, keys, decay = q * b.exp(), k * (total - b).exp(), total.transpose(-1, -2).exp()

    def step(state: torch.Tensor, write, erase, attention, queries, keys, decay) -> tuple[torch.Tensor, torch.Tensor]:
        new = write - erase @ state
        return state * decay + keys.transpose(-1, -2) @ new, attention @ new + queries @ state

    states = [None] * len(values) if initial_state is None else initial_state.chunk(len(values), dim=-1)
    outputs, finals = [], []
    for value, initial in zip(values, states, strict=True):
        value = layout.to_chunks(value).to(work_dtype)
        like = value.new_zeros(0, heads, q.shape[-1], value.shape[-1])
        out, final = layout.scan(
            step,
            layout.first_state(like, initial),
            *(inverse @ (beta * value), erase, attention, queries, keys, decay),
        )
        outputs.append(layout.from_chunks(value if out is None else out, batch).to(out_dtype))
        finals.append(final)
    return join_blocks(outputs), join_blocks(finals)


def _products(q: torch.Tensor, k: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the causal ``[..., C, C]`` products of rows decayed by ``b``, one number per row or per channel."""
    if b.shape[-1] > 1 or q.shape[-1] == 1:
        return decayed_products(q, k, b)
    later = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool, device=q.device).triu(1)
    decay = (b - b.transpose(-1, -2)).masked_fill(later, -torch.inf).exp()
    return (q @ k.transpose(-1, -2)) * decay
