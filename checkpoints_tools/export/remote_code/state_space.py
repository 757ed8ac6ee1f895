"""Mamba2's recurrence: ``S_t = exp(dt_t A) S_{t-1} + B_t (dt_t x_t)^T``, ``y_t = S_t^T C_t``."""

from __future__ import annotations

import torch

from .chunks import from_chunks, scan_spans, to_chunks
from .decay import causal_decay


def state_space(
    x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, state: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the recurrence over some tokens.

    Args:
        x: ``[B, T, H, P]`` inputs.
        dt: ``[B, T, H]`` time steps, in a wide dtype.
        A: ``[H]`` decay rates, below 0.
        B: ``[B, T, G, N]`` keys, each shared by a group of ``H / G`` heads.
        C: ``[B, T, G, N]`` queries.
        state: ``[B, G, N, (H / G) P]`` before the tokens, or None for zero.

    Returns:
        Outputs ``[B, T, H, P]`` in a wide dtype, and the state after the tokens.
    """
    if state is None:
        state = dt.new_zeros(x.shape[0], *B.shape[2:], x.shape[2] * x.shape[3] // B.shape[2])
    return scan_spans(_scan, (x * dt.unsqueeze(-1), dt * A, B, C), state)


def _scan(
    x: torch.Tensor, g: torch.Tensor, B: torch.Tensor, C: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    num_tokens, num_groups, head_dim = x.shape[1], B.shape[2], x.shape[-1]
    x, g, B, C = (to_chunks(y, state.dtype) for y in (x, g.unsqueeze(-1), B, C))
    b = g.cumsum(-2)
    total = b[..., -1:, :]
    products = (C @ B.transpose(-1, -2)).unsqueeze(2) * causal_decay(b.squeeze(-1)).unflatten(1, (num_groups, -1))
    within = products.flatten(1, 2) @ x
    # The heads of a group stand side by side, so that each chunk's B and C are multiplied once.
    inputs = _side_by_side(x * (total - b).exp(), num_groups)
    decays = _side_by_side(total.exp().expand(*total.shape[:-1], head_dim), num_groups)
    across = []
    for query, key, value, decay in zip(*(y.unbind(2) for y in (C, B, inputs, decays)), strict=True):
        across.append(query @ state)
        state = state * decay + key.transpose(-1, -2) @ value
    carried = torch.stack(across, dim=2).unflatten(-1, (-1, head_dim)).movedim(-2, 2).flatten(1, 2)
    return from_chunks(within + carried * b.exp(), num_tokens), state


def _side_by_side(x: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Return ``[B, G, N, C, (H / G) P]`` from ``x [B, H, N, C, P]``."""
    return x.unflatten(1, (num_groups, -1)).movedim(2, -2).flatten(-2)
