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

from statex_dist.ops.cu_seqlens import power_of_two_layout
from statex_dist.ops.features import Features, widened_delta
from statex_dist.ops.gla.torch_forms import decayed_products
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


def delta_step_(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    *,
    scale: float,
) -> torch.Tensor:
    """Run :func:`delta_step` over a contiguous ``state``, which it overwrites; return the output ``[B, HV, V]``."""
    out_dtype, shape = v.dtype, v.shape
    q, k = (y.repeat_interleave(v.shape[1] // y.shape[1], dim=1) for y in (q * scale, k))
    q, k, v, g, beta = (y.to(state.dtype).flatten(0, 1) for y in (q, k, v, g, beta))

    def advance(heads: torch.Tensor, decay, k, v, q, beta) -> torch.Tensor:
        heads.mul_(decay)
        heads.addcmul_(k.mT, beta * (v - k @ heads))
        return q @ heads

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
    if features is not None:
        q, k, v, g, beta = widened_delta((q, k, v, g, beta), features)
    if mix is not None:
        v = spread_values(v, mix.shape[1])
    if overwrite and state.is_contiguous():
        o = delta_step_(q, k, v, g, beta, state, scale=scale)
    else:
        o, state = delta_step(q, k, v, g, beta, state, scale=scale)
    return (o if mix is None else mix_outputs(o, mix)), state


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
    """Run :func:`delta_step` token by token: the oracle of the chunked form and of the kernels.

    Args:
        q: ``[B, T, H, K]``, as all others with ``T`` tokens.
        k: Keys.
        v: Values.
        g: Log decays.
        beta: Strengths of the writes.
        scale: Factor of the queries.
        initial_state: ``[S, HV, K, V]``, zero where None.
        cu_seqlens: ``[S + 1]`` borders of packed sequences; ``B`` must be 1.

    Returns:
        Output ``[B, T, HV, V]`` and final states ``[S, HV, K, V]``.
    """
    state_shape = (v.shape[2], q.shape[3], v.shape[3])
    step = partial(delta_step, scale=scale)
    return scan_tokens(step, (q, k, v, g, beta), v, state_shape, initial_state=initial_state, cu_seqlens=cu_seqlens)


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
        v: Values, or several tensors that stand side by side (:func:`statex_dist.ops.gla.torch_forms.chunked_gla`).
        chunk_size: Tokens per chunk, a power of two from 4; None picks one by the sequences' lengths.

    Raises:
        ConfigError: ``chunk_size`` is not a power of two from 4.
    """
    heads = g.shape[2]
    layout = power_of_two_layout(q, cu_seqlens, chunk_size)
    q, k = (y.repeat_interleave(heads // y.shape[2], dim=2) for y in (q * scale, k))
    q, k, g, beta = layout.to_wide_chunks(q, k, g, beta.unsqueeze(-1))
    b = g.cumsum(dim=2)
    total = b[:, :, -1:]
    identity = torch.eye(layout.chunk_size, dtype=q.dtype, device=q.device)
    system = identity + (beta * decayed_products(k, k, b)).tril(-1)
    inverse = torch.linalg.solve_triangular(system, identity, upper=False, unitriangular=True)
    attention, erase = decayed_products(q, k, b), inverse @ (beta * k * b.exp())
    queries, keys, decay = q * b.exp(), k * (total - b).exp(), total.transpose(-1, -2).exp()

    def step(state: torch.Tensor, write, erase, attention, queries, keys, decay) -> tuple[torch.Tensor, torch.Tensor]:
        new = write - erase @ state
        return state * decay + keys.transpose(-1, -2) @ new, attention @ new + queries @ state

    def scan(values: torch.Tensor, state: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        values = values.to(q.dtype)
        first = layout.first_state(values.new_zeros(0, heads, q.shape[-1], values.shape[-1]), state)
        per_chunk = inverse @ (beta * values), erase, attention, queries, keys, decay
        outputs, final = layout.scan(step, first, *per_chunk)
        return values if outputs is None else outputs, final

    return layout.scan_values(v, initial_state, scan)
