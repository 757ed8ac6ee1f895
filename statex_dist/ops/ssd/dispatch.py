"""The Mamba2 scan as models call it: the choice of a backend, and states carried across ranks."""

from __future__ import annotations

from typing import Any

import torch

from statex_dist.distributed.context_group import ContextShare
from statex_dist.ops.backends import Backend, add_to_first, pick_backend
from statex_dist.ops.chunk_groups import in_token_blocks
from statex_dist.ops.cu_seqlens import read_borders, reverse_cumsum
from statex_dist.ops.features import Features, products, state_blocks, widened_ssd
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
            of the inputs. The kernel gets ``B`` and ``C`` with their products, which are small: they are per group.
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
    initial = initial_state if context is None else None
    state: torch.Tensor | None
    if backend == "naive":
        y, state = naive_ssd(x, dt, A, B, C, features=features, initial_state=initial, cu_seqlens=cu_seqlens)
    elif backend == "kernel":
        wants_state = output_final_state and context is None
        options: dict[str, Any] = {"seq_idx": seq_idx, "output_final_state": wants_state}
        wide = (x, dt, A, B, C) if features is None else widened_ssd((x, dt, A, B, C), features)
        y, state = mamba_ssd(*wide, initial_state=initial, cu_seqlens=cu_seqlens, **options)
    else:
        options = {"features": features, "cu_seqlens": cu_seqlens, "chunk_size": chunk_size}
        y, state = chunked_ssd(x, dt, A, B, C, initial_state=initial, **options)
    if D is not None:
        y = add_skip(y, x, D)
    if context is not None:
        added, state = ssd_across(context, x, dt, A, B, C, cu_seqlens, initial_state, features)
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
    features: Features | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Carry a Mamba2 state across ranks.

    The final state is computed here, of the last sequence alone: asked of the scan, it would cost mamba_ssm's one call
    over packed sequences (:mod:`statex_dist.ops.ssd.mamba_api`).

    Arguments are those of :func:`ssd` for a share, ``initial`` the state ``[1, H, P, N]`` before the whole pack.

    Returns:
        What to add to the first outputs ``[1, L, H, P]``, and the state after the whole pack.
    """
    assert cu_seqlens is not None
    last, groups = slice(read_borders(cu_seqlens)[-2], None), C.shape[2]
    final = ssd_final_state(x[:, last], dt[:, last], A, B[:, last], features)
    b = (dt[:, : context.first_tokens] * A).to(final.dtype).cumsum(dim=1)
    before, after = context.exchange(final, b[:, -1].exp()[..., None, None], initial)
    C, b = C[:, : context.first_tokens], b.exp().unsqueeze(-1)
    sizes = state_blocks(C.shape[-1], features)
    old, *new = (y.unflatten(1, (groups, -1)).contiguous().to(C.dtype) for y in before.split(sizes, dim=-1))
    reads = torch.einsum("btgn,bghpn->btghp", C, old).flatten(2, 3)
    if features is None:
        return (reads * b).to(x.dtype), after

    def read_products(C: torch.Tensor) -> torch.Tensor:
        added = (products(C, features.map) * features.gain).to(C.dtype)
        return torch.einsum("btgn,bghpn->btghp", added, new[0]).flatten(2, 3)

    added = torch.cat(in_token_blocks(read_products, (C,), _bytes_of_token(x, sum(sizes), groups)), dim=1)
    return ((reads + added) * b).to(x.dtype), after


def _bytes_of_token(x: torch.Tensor, rows: int, groups: int) -> int:
    """Return the bytes of a token of ``x [B, T, H, P]`` beside its ``B`` and ``C`` with products."""
    return torch.float32.itemsize * (rows * groups + x.shape[2] * x.shape[3])


def ssd_final_state(
    x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, features: Features | None = None
) -> torch.Tensor:
    """Return the Mamba2 state ``[1, H, P, N]`` after one sequence from zero; arguments are those of :func:`ssd_across`.

    Decays are summed from the end: what is near it has a small exponent, which a difference of two large ones would
    round.
    """
    wide, groups = torch.promote_types(x.dtype, torch.float32), B.shape[2]
    g = (dt * A).to(wide)
    later = reverse_cumsum(g, 1) - g
    weighted = (x * dt.unsqueeze(-1)).to(wide) * later.exp().unsqueeze(-1)
    weighted = weighted.unflatten(2, (groups, -1))
    state = torch.einsum("btghp,btgn->bghpn", weighted, B.to(wide))
    if features is None:
        return state.flatten(1, 2)

    def of_products(weighted: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        return torch.einsum("btghp,btgn->bghpn", weighted, products(B, features.map).to(wide))

    rows = sum(state_blocks(B.shape[-1], features))
    added = in_token_blocks(of_products, (weighted, B), _bytes_of_token(x, rows, groups))
    return torch.cat([state, torch.stack(added).sum(0)], dim=-1).flatten(1, 2)
