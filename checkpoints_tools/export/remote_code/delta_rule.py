"""The gated delta rule: ``S_t = (I - b_t k_t k_t^T) diag(exp(g_t)) S_{t-1} + b_t k_t v_t^T``, ``o_t = S_t^T q_t``."""

from __future__ import annotations

import torch

from .chunks import from_chunks, scan_spans, to_chunks
from .decay import causal_decay
from .layers import wide
from .mixing import mix_outputs, spread_values
from .products import decayed_products


def delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor | None,
    *,
    mix: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the recurrence over some tokens.

    Args:
        q: ``[B, T, H, K]`` normalised queries.
        k: ``[B, T, H, K]`` normalised keys.
        v: ``[B, T, HV, V]`` values, ``HV`` a multiple of ``H``.
        g: ``[B, T, HV, 1]`` or ``[B, T, HV, K]`` log decays, at most 0.
        beta: ``[B, T, HV]`` strengths of the writes.
        state: ``[B, HV, K, r V]`` before the tokens, or None for zero.
        mix: ``[HV, r]`` mixing matrix, or None where ``r`` is 1.

    Returns:
        Outputs ``[B, T, HV, V]`` and the state after the tokens.
    """
    q = q * q.shape[-1] ** -0.5
    q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], dim=2) for x in (q, k))
    if mix is not None:
        v = spread_values(v, mix.shape[1])
    if state is None:
        state = wide(q).new_zeros(q.shape[0], *q.shape[2:], v.shape[-1])
    o, state = scan_spans(_scan, (q, k, v, g, beta), state)
    o = o.to(v.dtype)
    return (o if mix is None else mix_outputs(o, mix)), state


def _scan(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    num_tokens, beta = q.shape[1], beta.unsqueeze(-1)
    if num_tokens == 1:
        q, k, v, g, beta = (x.transpose(1, 2).to(state.dtype) for x in (q, k, v, g, beta))
        state = state * g.transpose(-1, -2).exp()
        state = state + k.transpose(-1, -2) @ (beta * (v - k @ state))
        return (q @ state).transpose(1, 2), state
    q, k, v, g, beta = (to_chunks(x, state.dtype) for x in (q, k, v, g, beta))
    b = g.cumsum(-2)
    total = b[..., -1:, :]
    # The writes of a chunk depend on each other: they solve a triangular system (arXiv 2406.06484).
    identity = torch.eye(q.shape[-2], dtype=q.dtype, device=q.device)
    system = identity + (beta * _products(k, k, b)).tril(-1)
    inverse = torch.linalg.solve_triangular(system, identity, upper=False, unitriangular=True)
    writes, erasures = inverse @ (beta * v), inverse @ (beta * k * b.exp())
    queries, keys, decays = q * b.exp(), (k * (total - b).exp()).transpose(-1, -2), total.transpose(-1, -2).exp()
    outputs = []
    pieces = (writes, erasures, _products(q, k, b), queries, keys, decays)
    for write, erase, attention, query, key, decay in zip(*(x.unbind(2) for x in pieces), strict=True):
        new = write - erase @ state
        outputs.append(attention @ new + query @ state)
        state = state * decay + key @ new
    return from_chunks(torch.stack(outputs, dim=2), num_tokens), state


def _products(q: torch.Tensor, k: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the causal ``[..., C, C]`` products of rows decayed by ``b``, one number a row or one a channel."""
    if b.shape[-1] == q.shape[-1] > 1:
        return decayed_products(q, k, b)
    return (q @ k.transpose(-1, -2)) * causal_decay(b.squeeze(-1))
