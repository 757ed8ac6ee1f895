"""The recurrences themselves, one token at a time: the oracle of every fast path, and the form that decoding uses.

Shapes follow flash-linear-attention and mamba_ssm: ``B`` batch, ``T`` tokens, ``H`` heads, ``K`` key channels, ``V``
value channels, ``G`` groups, ``P`` head channels, ``N`` state rows (``d_state``). With ``cu_seqlens [S + 1]`` the batch
is one row of ``S`` packed sequences, each with a state of its own. Everything runs in the dtype of the state: fp32, or
float64 for float64 inputs; outputs come back in the dtype of ``v`` or ``x``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from statex_dist.ops.cu_seqlens import borders_of
from statex_dist.ops.precision import wide_dtype


def gla_step(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, state: torch.Tensor, *, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advance gated linear attention by one token (arXiv 2312.06635, equation 3).

    Args:
        q: ``[B, H, K]`` queries.
        k: ``[B, H, K]`` keys.
        v: ``[B, H, V]`` values.
        g: ``[B, H, K]`` log decays, at most 0.
        state: ``[B, H, K, V]``.
        scale: Factor of the queries.

    Returns:
        Output ``[B, H, V]`` and the new state.
    """
    out_dtype = v.dtype
    q, k, v, g = (y.to(state.dtype) for y in (q, k, v, g))
    state = state * g.exp().unsqueeze(-1) + k.unsqueeze(-1) * v.unsqueeze(-2)
    return torch.einsum("bhk,bhkv->bhv", q * scale, state).to(out_dtype), state


def ssd_step(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advance the Mamba2 state-space recurrence by one token (arXiv 2405.21060, section 7; without the D term).

    Args:
        x: ``[B, H, P]`` inputs.
        dt: ``[B, H]`` step sizes, after softplus.
        A: ``[H]`` negative decay rates.
        B: ``[B, G, N]`` input projections, shared by the ``H / G`` heads of a group.
        C: ``[B, G, N]`` output projections.
        state: ``[B, H, P, N]``.

    Returns:
        Output ``[B, H, P]`` and the new state.
    """
    out_dtype = x.dtype
    x, dt, A, B, C = (y.to(state.dtype) for y in (x, dt, A, B, C))
    heads_per_group = x.shape[1] // B.shape[1]
    B = B.repeat_interleave(heads_per_group, dim=1)
    C = C.repeat_interleave(heads_per_group, dim=1)
    decay = (dt * A).exp()[..., None, None]
    state = state * decay + (x * dt.unsqueeze(-1)).unsqueeze(-1) * B.unsqueeze(-2)
    return torch.einsum("bhpn,bhn->bhp", state, C).to(out_dtype), state


def naive_gla(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    *,
    scale: float,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run gated linear attention token by token.

    Args:
        q: ``[B, T, H, K]`` queries.
        k: ``[B, T, H, K]`` keys.
        v: ``[B, T, H, V]`` values.
        g: ``[B, T, H, K]`` log decays, at most 0.
        scale: Factor of the queries.
        initial_state: ``[S, H, K, V]``, zero where None; ``S`` is the batch, or the number of packed sequences.
        cu_seqlens: ``[S + 1]`` borders of packed sequences; ``B`` must be 1.

    Returns:
        Output ``[B, T, H, V]`` and final states ``[S, H, K, V]``.
    """
    if cu_seqlens is not None:
        return over_sequences(partial(naive_gla, scale=scale), (q, k, v, g), cu_seqlens, initial_state)
    state = first_state(initial_state, q, (q.shape[0], q.shape[2], q.shape[3], v.shape[3]))
    outputs = []
    # unbind, not indexing: the gradient of x[:, t] fills a full-size tensor with zeros for every t.
    for q_t, k_t, v_t, g_t in zip(q.unbind(1), k.unbind(1), v.unbind(1), g.unbind(1), strict=True):
        output, state = gla_step(q_t, k_t, v_t, g_t, state, scale=scale)
        outputs.append(output)
    return torch.stack(outputs, dim=1) if outputs else v.new_zeros(v.shape), state


def naive_ssd(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    *,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the Mamba2 recurrence token by token (without the D term).

    Args:
        x: ``[B, T, H, P]`` inputs.
        dt: ``[B, T, H]`` step sizes, after softplus.
        A: ``[H]`` negative decay rates.
        B: ``[B, T, G, N]`` input projections.
        C: ``[B, T, G, N]`` output projections.
        initial_state: ``[S, H, P, N]``, zero where None.
        cu_seqlens: ``[S + 1]`` borders of packed sequences; the batch must be 1.

    Returns:
        Output ``[B, T, H, P]`` and final states ``[S, H, P, N]``.
    """
    if cu_seqlens is not None:

        def scan(x, dt, B, C, initial_state):
            return naive_ssd(x, dt, A, B, C, initial_state=initial_state)

        return over_sequences(scan, (x, dt, B, C), cu_seqlens, initial_state)
    state = first_state(initial_state, x, (x.shape[0], x.shape[2], x.shape[3], B.shape[3]))
    outputs = []
    for x_t, dt_t, B_t, C_t in zip(x.unbind(1), dt.unbind(1), B.unbind(1), C.unbind(1), strict=True):
        output, state = ssd_step(x_t, dt_t, A, B_t, C_t, state)
        outputs.append(output)
    return torch.stack(outputs, dim=1) if outputs else x.new_zeros(x.shape), state


def over_sequences(
    scan: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    tensors: Sequence[torch.Tensor],
    cu_seqlens: torch.Tensor,
    initial_state: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a scan over each packed sequence by itself.

    Args:
        scan: Takes the tensors of one sequence and its ``initial_state``.
        tensors: ``[1, T, ...]`` each.
        cu_seqlens: ``[S + 1]`` borders.
        initial_state: ``[S, ...]`` or None.

    Returns:
        Outputs ``[1, T, ...]`` and final states ``[S, ...]``.
    """
    parts = [
        scan(
            *(x[:, start:stop] for x in tensors),
            initial_state=None if initial_state is None else initial_state[i : i + 1],
        )
        for i, (start, stop) in enumerate(borders_of(cu_seqlens))
    ]
    return torch.cat([o for o, _ in parts], dim=1), torch.cat([s for _, s in parts])


def first_state(initial_state: torch.Tensor | None, like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Return the state before the first token, zero where none is given, in the dtype that recurrences run in."""
    wide = wide_dtype(like.dtype)
    return like.new_zeros(shape, dtype=wide) if initial_state is None else initial_state.to(wide)
