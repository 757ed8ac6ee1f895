"""Gated linear attention: ``S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T``, ``o_t = S_t^T q_t``."""

from __future__ import annotations

import torch

from .chunks import from_chunks, scan_spans, to_chunks
from .layers import wide
from .mixing import mix_outputs, spread_values
from .products import decayed_products


def linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    state: torch.Tensor | None,
    *,
    scale: float,
    mix: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the recurrence over some tokens.

    Args:
        q: ``[B, T, H, K]`` queries.
        k: ``[B, T, H, K]`` keys.
        v: ``[B, T, H, V]`` values.
        g: ``[B, T, H, K]`` log decays, at most 0.
        state: ``[B, H, K, r V]`` before the tokens, or None for zero.
        scale: Factor of the queries.
        mix: ``[H, r]`` mixing matrix, or None where ``r`` is 1.

    Returns:
        Outputs ``[B, T, H, V]`` and the state after the tokens.
    """
    if mix is not None:
        v = spread_values(v, mix.shape[1])
    if state is None:
        state = wide(q).new_zeros(q.shape[0], *q.shape[2:], v.shape[-1])
    o, state = scan_spans(_scan, (q * scale, k, v, g), state)
    o = o.to(v.dtype)
    return (o if mix is None else mix_outputs(o, mix)), state


def _scan(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    num_tokens = q.shape[1]
    if num_tokens == 1:
        q, k, v, g = (x.squeeze(1).to(state.dtype) for x in (q, k, v, g))
        state = state * g.exp().unsqueeze(-1) + k.unsqueeze(-1) * v.unsqueeze(-2)
        return (q.unsqueeze(-2) @ state).transpose(1, 2), state
    q, k, v, g = (to_chunks(x, state.dtype) for x in (q, k, v, g))
    b = g.cumsum(-2)
    total = b[..., -1:, :]
    within = decayed_products(q, k, b) @ v
    queries, keys, decays = q * b.exp(), (k * (total - b).exp()).transpose(-1, -2), total.transpose(-1, -2).exp()
    across = []
    for query, key, value, decay in zip(*(x.unbind(2) for x in (queries, keys, v, decays)), strict=True):
        across.append(query @ state)
        state = state * decay + key @ value
    return from_chunks(within + torch.stack(across, dim=2), num_tokens), state
