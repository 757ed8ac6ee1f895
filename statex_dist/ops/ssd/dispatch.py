"""The Mamba2 scan as models call it: the choice of a backend, and states carried across ranks."""

from __future__ import annotations

from typing import Any

import torch

from statex_dist.distributed.context_group import ContextShare
from statex_dist.ops.backends import Backend, add_to_first, pick_backend
from statex_dist.ops.cu_seqlens import read_borders, reverse_cumsum
from statex_dist.ops.features import Features, widened_ssd
from statex_dist.ops.ssd.mamba_api import has_mamba_ssm, mamba_ssd
from statex_dist.ops.ssd.torch_forms import add_skip, chunked_ssd, naive_ssd


def ssd(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    *,
    D: torch.Tensor | None = None,
    features: Features | None = None,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    output_final_state: bool = True,
    backend: Backend = "auto",
    chunk_size: int | None = None,
    context: ContextShare | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The Mamba2 scan for any ``d_state``.

    Args:
        x: ``[B, T, H, P]`` inputs.
        dt: ``[B, T, H]`` step sizes, after softplus.
        A: ``[H]`` negative decay rates.
        B: ``[B, T, G, N]`` input projections.
        C: ``[B, T, G, N]`` output projections.
        D: ``[H]`` skip weights or None.
        features: Products of B and C as further state rows, or None. ``N`` of the states is then ``(1 + n)`` times that
            of the inputs.
        initial_state: ``[S, H, P, N]`` or None for zero.
        cu_seqlens: ``[S + 1]`` borders of packed sequences; the batch must be 1.
        seq_idx: ``[B, T]`` int32, the same borders in mamba_ssm's form, which saves its kernel deriving them.
        output_final_state: Whether the final states are needed.
        backend: Which implementation runs.
        chunk_size: Tokens per chunk of the chunked form; None picks one.
        context: This rank's share of a pack that ranks share, or None. States are then those before and after the whole
            pack, of one sequence.

    Returns:
        Output ``[B, T, H, P]`` and final states ``[S, H, P, N]`` (None unless asked for).
    """
    backend = pick_backend(backend, x, has_mamba_ssm)
    if features is not None:
        x, dt, A, B, C = widened_ssd((x, dt, A, B, C), features)
    initial = initial_state if context is None else None
    state: torch.Tensor | None
    if backend == "naive":
        y, state = naive_ssd(x, dt, A, B, C, initial_state=initial, cu_seqlens=cu_seqlens)
    elif backend == "kernel":
        wants_state = output_final_state and context is None
        options: dict[str, Any] = {"seq_idx": seq_idx, "output_final_state": wants_state}
        y, state = mamba_ssd(x, dt, A, B, C, initial_state=initial, cu_seqlens=cu_seqlens, **options)
    else:
        y, state = chunked_ssd(x, dt, A, B, C, initial_state=initial, cu_seqlens=cu_seqlens, chunk_size=chunk_size)
    if D is not None:
        y = add_skip(y, x, D)
    if context is not None:
        added, state = ssd_across(context, x, dt, A, B, C, cu_seqlens, initial_state)
        y = add_to_first(y, added)
    return y, state if output_final_state else None


def ssd_across(
    context: ContextShare,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    initial: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Carry a Mamba2 state across ranks.

    The final state is computed here, of the last sequence alone: asked of the scan, it would cost mamba_ssm's one call
    over packed sequences (:mod:`statex_dist.ops.ssd.mamba_api`).

    Arguments are those of :func:`ssd` for a share, ``initial`` the state ``[1, H, P, N]`` before the whole pack.

    Returns:
        What to add to the first outputs ``[1, L, H, P]``, and the state after the whole pack.
    """
    assert cu_seqlens is not None
    last = slice(read_borders(cu_seqlens)[-2], None)
    final = ssd_final_state(x[:, last], dt[:, last], A, B[:, last])
    b = (dt[:, : context.first_tokens] * A).to(final.dtype).cumsum(dim=1)
    before, after = context.exchange(final, b[:, -1].exp()[..., None, None], initial)
    reads = torch.einsum(
        "btgn,bghpn->btghp",
        C[:, : context.first_tokens],
        before.unflatten(1, (C.shape[2], -1)).to(C.dtype),
    ).flatten(2, 3)
    return (reads * b.exp().unsqueeze(-1)).to(x.dtype), after


def ssd_final_state(x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """Return the Mamba2 state ``[1, H, P, N]`` after one sequence from zero; arguments are those of :func:`ssd_across`.

    Decays are summed from the end: what is near it has a small exponent, which a difference of two large ones would
    round.
    """
    wide, groups = torch.promote_types(x.dtype, torch.float32), B.shape[2]
    g = (dt * A).to(wide)
    later = reverse_cumsum(g, 1) - g
    weighted = (x * dt.unsqueeze(-1)).to(wide) * later.exp().unsqueeze(-1)
    return torch.einsum("btghp,btgn->bghpn", weighted.unflatten(2, (groups, -1)), B.to(wide)).flatten(1, 2)
