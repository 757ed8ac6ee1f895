"""Gated linear attention as models call it: the choice of a backend, and states carried across ranks."""

from __future__ import annotations

from functools import partial

import torch

from statex_dist.distributed.context_group import ContextShare
from statex_dist.ops.backends import Backend, Forms, mixed_scan
from statex_dist.ops.chunk_groups import in_token_blocks
from statex_dist.ops.features import Features, decay_rows, decayed, products, state_blocks, widened_gla
from statex_dist.ops.fla_api import fla_gla, has_fla
from statex_dist.ops.gla.torch_forms import chunked_gla, naive_gla
from statex_dist.ops.gla.triton.expanded import SMALLEST_CHUNK, expanded_gla
from statex_dist.state.geometry import LARGEST_PLAIN_HEAD


def gla(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    *,
    scale: float | None = None,
    mix: torch.Tensor | None = None,
    features: Features | None = None,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    backend: Backend = "auto",
    chunk_size: int | None = None,
    max_state_bytes: int | None = None,
    output_final_state: bool = True,
    context: ContextShare | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gated linear attention, plain, merged (one wide head) or mixed.

    On a GPU, heads of the size of public checkpoints run on fla's kernels; larger ones and those with features run on
    :func:`statex_dist.ops.gla.triton.expanded.expanded_gla`. Of all backends only ``kernel`` gets the products of a
    whole sequence; the others make those of some tokens at a time.

    Args:
        q: ``[B, T, H, K]`` queries.
        k: ``[B, T, H, K]`` keys.
        v: ``[B, T, H, V]`` values.
        g: ``[B, T, H, K]`` log decays, at most 0.
        scale: Factor of the queries, ``K ** -0.5`` where None.
        mix: ``[H, r]`` mixing matrix; the state then holds ``r`` value heads per key head.
        features: Products of the keys and queries as further key channels, or None. ``K`` of the states is then
            ``(1 + n)`` times that of the inputs.
        initial_state: ``[S, H, K, r V]`` or None for zero.
        cu_seqlens: ``[S + 1]`` borders of packed sequences; ``B`` must be 1.
        backend: Which implementation runs.
        chunk_size: Tokens per chunk of the forms ``triton`` and ``chunked``; None picks one.
        max_state_bytes: Bound of the chunk states that ``triton`` holds at once; None for its default.
        output_final_state: Whether the final states are needed.
        context: This rank's share of a pack that ranks share, or None. States are then those before and after the whole
            pack, of one sequence.

    Returns:
        Output ``[B, T, H, V]`` and final states ``[S, H, K, r V]`` (None unless asked for).

    Raises:
        ConfigError: The backend is unknown, or ``chunk_size`` or ``max_state_bytes`` not allowed.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    wants_state = output_final_state or context is not None
    o, state = mixed_scan(
        backend,
        Forms(
            has_kernels=has_fla,
            naive=naive_gla,
            kernel=fla_gla,
            chunked=chunked_gla,
            across=gla_across,
            widened=widened_gla,
            triton=partial(expanded_gla, max_state_bytes=max_state_bytes, output_final_state=wants_state),
        ),
        (q, k, v, g),
        mix=mix,
        features=features,
        chunk_size=chunk_size,
        context=context,
        initial_state=initial_state,
        fits_triton=_is_expanded(q, v, mix, features),
        scale=scale,
        cu_seqlens=cu_seqlens,
    )
    return o, state if output_final_state else None


def _is_expanded(q: torch.Tensor, v: torch.Tensor, mix: torch.Tensor | None, features: Features | None) -> bool:
    """Return whether our kernels suit a head: a state larger than fla's are quick and lean for, or features."""
    elements = q.shape[-1] * v.shape[-1] * (1 if mix is None else mix.shape[1])
    fits = q.is_cuda and q.dtype in (torch.bfloat16, torch.float32) and q.shape[1] >= SMALLEST_CHUNK
    return fits and (elements > LARGEST_PLAIN_HEAD or features is not None)


def gla_across(
    context: ContextShare,
    inputs: tuple[torch.Tensor, ...],
    final: torch.Tensor,
    initial: torch.Tensor | None,
    *,
    scale: float,
    features: Features | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the state before a rank's share adds to the outputs of a scan from zero (docs/method.md, section 3).

    It serves every backend alike: the share's total decay and final state go to the other ranks, and the state before
    the share comes from them. No exponent is positive.

    Args:
        context: This rank's share.
        inputs: ``q, k, v, g [1, T, H, .]`` of the share.
        final: ``[1, H, K, r V]`` state after the share's last sequence, from zero.
        initial: ``[1, H, K, r V]`` state before the whole pack, or None for zero.
        scale: Factor of the queries.
        features: Products that are key channels of the state too, or None.

    Returns:
        What to add to the first outputs ``[1, L, H, r V]``, and the state after the whole pack.
    """
    q, _, _, g = (x[:, : context.first_tokens] for x in inputs)
    b = g.to(final.dtype).cumsum(dim=1)
    decay = decay_rows(b[:, -1].exp().unsqueeze(-1), final.shape[-2])
    before, after = context.exchange(final, decay, initial)
    old, *new = (x.contiguous().to(q.dtype) for x in before.split(state_blocks(q.shape[-1], features), dim=-2))
    reads = torch.einsum("bthk,bhkv->bthv", (q * scale * b.exp()).to(q.dtype), old)
    if features is None:
        return reads, after

    def read_products(q: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        queries = decayed(products(q, features.map) * features.gain * scale, b.exp()).to(q.dtype)
        return torch.einsum("bthk,bhkv->bthv", queries, new[0])

    width = final.shape[1] * (final.shape[-2] + final.shape[-1])
    return reads + torch.cat(in_token_blocks(read_products, (q, b), width * final.itemsize), dim=1), after
