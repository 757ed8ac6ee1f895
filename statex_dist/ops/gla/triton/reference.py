"""The pieces of :mod:`~statex_dist.ops.gla.triton.expanded` in PyTorch: the kernels' oracle, and the path on a CPU.

Each function has a Triton counterpart of the same name and arguments in :mod:`features`, :mod:`gates`, :mod:`scores`
or :mod:`carry`. Their results agree, but for the first of :func:`pregate`, which only the other pieces of the same kind
read. Where log decays are fewer than channels, as with features, ``K_g`` for ``K``, they repeat.
"""

from __future__ import annotations

import torch

from statex_dist.ops.cu_seqlens import join, reverse_cumsum
from statex_dist.ops.features import Features, decayed, join_sum, with_products
from statex_dist.ops.gla.torch_forms import decayed_products
from statex_dist.ops.gla.triton.segments import Segment


def widen(x: torch.Tensor, features: Features, *, gain: bool) -> torch.Tensor:
    """Return ``[x ; phi(x)] [tokens, H, (1 + n) K]`` of ``x [tokens, H, K]``, with the gains where ``gain``."""
    return with_products(x, features, gain=gain)


def narrow(
    x: torch.Tensor, dwide: torch.Tensor, features: Features, out: torch.Tensor, *, gain: bool
) -> torch.Tensor | None:
    """Write the gradient of ``x`` in :func:`widen` to ``out``; return that of the gains ``[H, n K]``, if they are used.

    Args:
        x: ``[tokens, H, K]``.
        dwide: ``[tokens, H, (1 + n) K]`` gradient of the result.
        features: The products.
        out: ``[tokens, H, K]``, overwritten.
        gain: As for :func:`widen`.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    leaves = [y.detach().to(wide).requires_grad_() for y in ((x, features.gain) if gain else (x,))]
    with torch.enable_grad():
        result = with_products(leaves[0], Features(features.map, leaves[-1]), gain=gain)
    dx, *dgain = torch.autograd.grad(result, leaves, dwide.to(wide))
    out.copy_(dx)
    return dgain[0] if gain else None


def pregate(
    q: torch.Tensor, k: torch.Tensor, g: torch.Tensor, segment: Segment, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a chunk's queries and keys with their decays to and from its borders.

    Args:
        q: ``[tokens, H, K]`` queries.
        k: ``[tokens, H, K]`` keys.
        g: ``[tokens, H, K_g]`` log decays.
        segment: The chunks to read.
        scale: Factor of the queries.

    Returns:
        The cumulative log decays ``b [H, n, C, K_g]``, gated queries ``s q e^b`` and keys ``k e^{b_C - b}``
        ``[H, n, C, K]`` in ``q``'s dtype, and the chunks' total log decays ``b_C [H, n, K]`` in fp32.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    g_wide = segment.take(g).to(wide)
    b = g_wide.cumsum(dim=2)
    later = reverse_cumsum(g_wide, 2) - g_wide
    queries = (decayed(segment.take(q).to(wide), b.exp()) * scale).to(q.dtype)
    keys = decayed(segment.take(k).to(wide), later.exp()).to(q.dtype)
    return b, queries, keys, join([b[:, :, -1]] * (q.shape[-1] // b.shape[-1]), dim=-1)


def scores(q: torch.Tensor, k: torch.Tensor, b: torch.Tensor, segment: Segment, scale: float) -> torch.Tensor:
    """Return ``A [H, n, C, C]``: ``A[t, u] = s sum_c q_tc k_uc exp(b_tc - b_uc)`` for ``u <= t``, else 0."""
    wide = b.dtype
    blocks = zip(_blocks(q, b), _blocks(k, b), strict=True)
    parts = [decayed_products(segment.take(x).to(wide) * scale, segment.take(y).to(wide), b) for x, y in blocks]
    return join_sum(parts).to(q.dtype)


def _blocks(x: torch.Tensor, b: torch.Tensor) -> list[torch.Tensor]:
    """Return the blocks of channels of ``x [..., K]`` that each have the decays ``b [..., K_g]``."""
    return [part.contiguous() for part in x.split(b.shape[-1], dim=-1)]


def carry_states(
    total: torch.Tensor,
    update: torch.Tensor,
    carried: torch.Tensor,
    initial: torch.Tensor | None,
    final: torch.Tensor | None,
    segment: Segment,
) -> None:
    """Run ``S <- e^{b_C} S + update`` over a segment's chunks, from the state before its first one.

    Args:
        total: ``[H, n, K]`` log decays of the chunks.
        update: ``[H, n, K, W]`` sums that the chunks add; overwritten by the state before each chunk.
        carried: ``[H, K, W]`` fp32 state before the segment; overwritten by the one after it.
        initial: ``[S, H, K, W]`` fp32 states before each sequence, or None for zero.
        final: ``[S, H, K, W]`` fp32, filled for the sequences that end in the segment; or None.
        segment: Says where sequences begin and end.
    """
    state = carried.clone()
    sequences, firsts, lasts = (x.tolist() for x in (segment.sequence, segment.is_first, segment.is_last))
    for i, (sequence, is_first, is_last) in enumerate(zip(sequences, firsts, lasts, strict=True)):
        if is_first:
            state = torch.zeros_like(state) if initial is None else initial[sequence].clone()
        added = update[:, i].to(state.dtype, copy=True)
        update[:, i] = state
        state = state * total[:, i].exp().unsqueeze(-1) + added
        if is_last and final is not None:
            final[sequence] = state
    carried.copy_(state)


def carry_gradients(
    total: torch.Tensor,
    starts: torch.Tensor,
    reads: torch.Tensor,
    mix: torch.Tensor | None,
    carried: torch.Tensor,
    dfinal: torch.Tensor | None,
    dinitial: torch.Tensor | None,
    segment: Segment,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the gradient of :func:`carry_states` backwards over a segment's chunks.

    Args:
        total: ``[H, n, K]`` log decays of the chunks.
        starts: ``[H, n, K, W]`` state before each chunk.
        reads: ``[H, n, K, W]`` gradient that each chunk's outputs give to the state before it, without ``mix``;
            overwritten by the gradient of the state after each chunk.
        mix: ``[H, r]`` weights of the ``r`` blocks of ``W``, or None for one of weight 1.
        carried: ``[H, K, W]`` fp32 gradient of the state after the segment; overwritten by that before it.
        dfinal: ``[S, H, K, W]`` fp32 gradient of the sequences' final states, or None for zero.
        dinitial: ``[S, H, K, W]`` fp32, filled for the sequences that begin in the segment; or None.
        segment: Says where sequences begin and end.

    Returns:
        The gradients of ``total`` ``[H, n, K]`` and of ``mix`` through the states ``[H, r]``, in fp32.
    """
    grad = carried.clone()
    partners = 1 if mix is None else mix.shape[1]
    weights = grad.new_ones(grad.shape[0], 1) if mix is None else mix.to(grad.dtype)
    dtotal, dmix = torch.empty_like(total), torch.zeros_like(weights)
    sequences, firsts, lasts = (x.tolist() for x in (segment.sequence, segment.is_first, segment.is_last))
    for i in reversed(range(segment.num_chunks)):
        if lasts[i]:
            grad = torch.zeros_like(grad) if dfinal is None else dfinal[sequences[i]].clone()
        start, read = (x[:, i].to(grad.dtype, copy=True).unflatten(-1, (partners, -1)) for x in (starts, reads))
        reads[:, i] = grad
        decayed = grad * total[:, i].exp().unsqueeze(-1)
        dtotal[:, i] = (start.flatten(-2) * decayed).sum(-1)
        dmix += (start * read).sum((1, 3))
        grad = decayed + (read * weights[:, None, :, None]).flatten(-2)
        if firsts[i] and dinitial is not None:
            dinitial[sequences[i]] = grad
    carried.copy_(grad)
    return dtotal, dmix


def input_gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    b: torch.Tensor,
    dscores: torch.Tensor,
    dqueries: torch.Tensor,
    dkeys: torch.Tensor,
    dtotal: torch.Tensor,
    segment: Segment,
    scale: float,
    out: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    """Write the gradients of queries, keys and log decays.

    Args:
        q: ``[tokens, H, K]`` queries.
        k: ``[tokens, H, K]`` keys.
        b: From :func:`pregate`.
        dscores: ``[H, n, C, C]`` gradient of :func:`scores`; what is above the diagonal is not read.
        dqueries: ``[H, n, C, K]`` gradient of the gated queries.
        dkeys: ``[H, n, C, K]`` gradient of the gated keys.
        dtotal: ``[H, n, K]`` gradient of the chunks' total log decays through the carried states.
        segment: The chunks.
        scale: Factor of the queries.
        out: ``dq, dk [tokens, H, K]`` and ``dg [tokens, H, K_g]``, written at the segment's tokens.
    """
    parts = [
        _block_gradients(segment.take(x), segment.take(y), b, dscores, *grads, scale=scale)
        for x, y, *grads in zip(*(_blocks(x, b) for x in (q, k, dqueries, dkeys, dtotal)), strict=True)
    ]
    dq, dk, dg = zip(*parts, strict=True)
    for gradient, target in zip((join(dq, dim=-1), join(dk, dim=-1), join_sum(dg)), out, strict=True):
        segment.put(gradient.to(target.dtype), target)


def _block_gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    b: torch.Tensor,
    dscores: torch.Tensor,
    dqueries: torch.Tensor,
    dkeys: torch.Tensor,
    dtotal: torch.Tensor,
    *,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what one block of channels gives to the gradients of :func:`input_gradients`, ``[H, n, C, K_g]`` each."""
    wide = b.dtype
    leaves = [x.detach().to(wide).requires_grad_() for x in (q, k, b)]
    with torch.enable_grad():
        products = decayed_products(leaves[0] * scale, leaves[1], leaves[2])
    dq, dk, db = torch.autograd.grad(products, leaves, dscores.to(wide).tril())
    q_wide, k_wide, _ = (x.detach() for x in leaves)
    dq_inter = dqueries.to(wide) * b.exp() * scale
    dk_inter = dkeys.to(wide) * (b[:, :, -1:] - b).exp()
    db = db + q_wide * dq_inter - k_wide * dk_inter
    dlast = dtotal.unsqueeze(2) + (k_wide * dk_inter).sum(2, keepdim=True)
    return dq + dq_inter, dk + dk_inter, reverse_cumsum(db, 2) + dlast
