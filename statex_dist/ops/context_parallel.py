"""What the state before a rank's share of a sequence adds to the outputs of a scan that began from zero.

Each function gives its share's total decay and final state to the other ranks, gets the state before the share, and
returns the outputs that this state adds to the share's first sequence (docs/method.md, section 3). They serve every
backend of the scan alike. No exponent is positive.
"""

from __future__ import annotations

import torch

from statex_dist.distributed.context_group import ContextShare
from statex_dist.ops.cu_seqlens import read_borders
from statex_dist.ops.delta import chunked_delta_rule
from statex_dist.ops.precision import wide_dtype


def gla_across(
    context: ContextShare,
    inputs: tuple[torch.Tensor, ...],
    final: torch.Tensor,
    initial: torch.Tensor | None,
    *,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Carry a GLA state across ranks.

    Args:
        context: This rank's share.
        inputs: ``q, k, v, g [1, T, H, .]`` of the share.
        final: ``[1, H, K, r V]`` state after the share's last sequence, from zero.
        initial: ``[1, H, K, r V]`` state before the whole pack, or None for zero.
        scale: Factor of the queries.

    Returns:
        What to add to the first outputs ``[1, L, H, r V]``, and the state after the whole pack.
    """
    q, _, _, g = (x[:, : context.first_tokens] for x in inputs)
    b = g.to(final.dtype).cumsum(dim=1)
    before, after = context.exchange(final, b[:, -1].exp().unsqueeze(-1), initial)
    queries = (q * scale * b.exp()).to(q.dtype)
    return torch.einsum("bthk,bhkv->bthv", queries, before.to(q.dtype)), after


def delta_across(
    context: ContextShare,
    inputs: tuple[torch.Tensor, ...],
    final: torch.Tensor,
    initial: torch.Tensor | None,
    *,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Carry a delta-rule state across ranks; arguments and results are those of :func:`gla_across`.

    Its transition is a matrix per head, which the scan itself computes: run from the identity and without values.
    """
    q, k, _, g, beta = (x[:, : context.first_tokens] for x in inputs)
    keys = q.shape[-1]
    identity = torch.eye(keys, dtype=final.dtype, device=q.device).expand(1, beta.shape[2], keys, keys)
    nothing = q.new_zeros(*beta.shape, keys)
    reads, transition = chunked_delta_rule(q, k, nothing, g, beta, scale=scale, initial_state=identity)
    before, after = context.exchange(final, transition, initial)
    return torch.einsum("bthk,bhkv->bthv", reads, before.to(reads.dtype)), after


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
    over packed sequences (``mamba_api``).

    Args:
        context: This rank's share.
        x: ``[1, T, H, P]`` inputs.
        dt: ``[1, T, H]`` step sizes.
        A: ``[H]`` negative decay rates.
        B: ``[1, T, G, N]`` input projections.
        C: ``[1, T, G, N]`` output projections.
        cu_seqlens: ``[S + 1]`` borders of the share's sequences.
        initial: ``[1, H, P, N]`` state before the whole pack, or None for zero.

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
    wide, groups = wide_dtype(x.dtype), B.shape[2]
    g = (dt * A).to(wide)
    later = g.flip(1).cumsum(dim=1).flip(1) - g
    weighted = (x * dt.unsqueeze(-1)).to(wide) * later.exp().unsqueeze(-1)
    return torch.einsum("btghp,btgn->bghpn", weighted.unflatten(2, (groups, -1)), B.to(wide)).flatten(1, 2)


def add_to_first(o: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
    """Return ``o [1, T, ...]`` with ``added [1, L, ...]`` on its first tokens."""
    count = added.shape[1]
    first = o[:, :count] + added.to(o.dtype)
    return first if count == o.shape[1] else torch.cat([first, o[:, count:]], dim=1)
