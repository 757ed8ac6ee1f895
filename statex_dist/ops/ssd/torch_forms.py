"""The Mamba2 recurrence (SSD) in PyTorch: token by token (the oracle), one step of decoding, and chunk by chunk.

Shapes follow mamba_ssm: ``B`` batch, ``T`` tokens, ``H`` heads, ``G`` groups, ``P`` head channels, ``N`` state rows
(``d_state``). Packing and dtypes are those of :mod:`statex_dist.ops.gla.torch_forms`; outputs come back in the dtype of
``x``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from statex_dist.errors import ConfigError
from statex_dist.ops.chunk_groups import ChunkRun
from statex_dist.ops.cu_seqlens import (
    at_least_fp32,
    causal_decay,
    chunk_layout,
    join,
    pick_chunk_size,
    sequence_lengths,
)
from statex_dist.ops.features import Features, block_sizes, join_sum, linear_products, state_blocks, widened_ssd
from statex_dist.ops.token_steps import scan_tokens, step_in_blocks


def ssd_step(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    state: torch.Tensor,
    *,
    projected: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advance the Mamba2 state-space recurrence by one token (arXiv 2405.21060, section 7; without the D term).

    Args:
        x: ``[B, H, P]`` inputs.
        dt: ``[B, H]`` step sizes, after softplus.
        A: ``[H]`` negative decay rates.
        B: ``[B, G, N]`` input projections, shared by the ``H / G`` heads of a group.
        C: ``[B, G, N]`` output projections.
        state: ``[B, H, P, N]``.
        projected: Number of the state rows that are of no products, where the others are: each of the two blocks is
            then summed by itself.

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
    if projected is None:
        return torch.einsum("bhpn,bhn->bhp", state, C).to(out_dtype), state
    sizes = block_sizes(C.shape[-1], projected)
    blocks = zip(state.split(sizes, dim=-1), C.split(sizes, dim=-1), strict=True)
    # contiguous: the same rows behind a longer stride may be summed in another order
    reads = [torch.einsum("bhpn,bhn->bhp", rows.contiguous(), y) for rows, y in blocks]
    return join_sum(reads).to(out_dtype), state


def ssd_step_(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    state: torch.Tensor,
    *,
    projected: int | None = None,
) -> torch.Tensor:
    """Run :func:`ssd_step` over a contiguous ``state``, which it overwrites; return the output ``[B, H, P]``."""
    out_dtype, shape = x.dtype, x.shape
    x, dt, A, B, C = (y.to(state.dtype) for y in (x, dt, A, B, C))
    decay = (dt * A).exp().flatten()[:, None, None]
    inserted = (x * dt.unsqueeze(-1)).flatten(0, 1).unsqueeze(-1)
    B, C = (y.repeat_interleave(shape[1] // y.shape[1], dim=1).flatten(0, 1) for y in (B, C))

    sizes = block_sizes(C.shape[-1], projected)

    def advance(heads: torch.Tensor, decay, inserted, B, C) -> torch.Tensor:
        heads.mul_(decay).addcmul_(inserted, B)
        return join_sum([S @ y for S, y in zip(heads.split(sizes, -1), C.split(sizes, -2), strict=True)])

    inputs = decay, inserted, B.unsqueeze(-2), C.unsqueeze(-1)
    return step_in_blocks(advance, state, inputs).view(shape).to(out_dtype)


def ssd_decode(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    state: torch.Tensor,
    *,
    D: torch.Tensor | None = None,
    features: Features | None = None,
    overwrite: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advance ``ssd`` by one token: ``x [B, H, P]``, ``dt [B, H]``, ``B, C [B, G, N]``, ``state [B, H, P, N]``.

    With ``overwrite`` the new state takes the old one's place in memory: without autograd, and if the caller owns it.
    """
    projected = None
    if features is not None:
        projected = B.shape[-1]
        x, dt, A, B, C = widened_ssd((x, dt, A, at_least_fp32(B), at_least_fp32(C)), features)
    if overwrite and state.is_contiguous():
        y = ssd_step_(x, dt, A, B, C, state, projected=projected)
    else:
        y, state = ssd_step(x, dt, A, B, C, state, projected=projected)
    return (y if D is None else add_skip(y, x, D)), state


def add_skip(y: torch.Tensor, x: torch.Tensor, D: torch.Tensor) -> torch.Tensor:
    """Return ``y + D x``: ``y, x [..., H, P]``, ``D [H]``."""
    return y + x * D.to(x.dtype).unsqueeze(-1)


def naive_ssd(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    *,
    features: Features | None = None,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run :func:`ssd_step` token by token: the oracle of all other forms.

    Args:
        x: ``[B, T, H, P]``, as all others but ``A`` with ``T`` tokens.
        dt: Step sizes.
        A: ``[H]`` negative decay rates.
        B: Input projections.
        C: Output projections.
        features: Products that are state rows too, or None.
        initial_state: ``[S, H, P, N]``, zero where None.
        cu_seqlens: ``[S + 1]`` borders of packed sequences; the batch must be 1.

    Returns:
        Output ``[B, T, H, P]`` and final states ``[S, H, P, N]``.
    """
    projected = None
    if features is not None:
        projected = B.shape[-1]
        x, dt, A, B, C = widened_ssd((x, dt, A, at_least_fp32(B), at_least_fp32(C)), features)

    def step(x, dt, B, C, state) -> tuple[torch.Tensor, torch.Tensor]:
        return ssd_step(x, dt, A, B, C, state, projected=projected)

    state_shape = (*x.shape[2:], B.shape[3])
    return scan_tokens(step, (x, dt, B, C), x, state_shape, initial_state=initial_state, cu_seqlens=cu_seqlens)


def chunked_ssd(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    *,
    features: Features | None = None,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    chunk_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the Mamba2 recurrence chunk by chunk. Arguments and results are those of ``naive_ssd``.

    The decay is one number per head, so ``exp(b_t - b_u)`` is formed directly (masked before the exponential), and the
    products of B and C are made once per group, its heads folded into the width of the other factor.
    """
    batch, num_tokens, num_heads, head_dim = x.shape
    num_groups = B.shape[2]
    lengths = sequence_lengths(batch, num_tokens, cu_seqlens)
    chunk_size = pick_chunk_size(lengths) if chunk_size is None else chunk_size
    if chunk_size < 1:
        raise ConfigError(f"chunk_size must be 1 or more, not {chunk_size}")
    layout = chunk_layout(lengths, chunk_size, x.device)
    wide = torch.promote_types(x.dtype, torch.float32)
    inputs = (dt * A).unsqueeze(-1), x * dt.unsqueeze(-1), B, C
    sizes = state_blocks(B.shape[3], features)
    like = [x.new_zeros(0, num_heads, head_dim, size, dtype=wide) for size in sizes]
    given = [None] * len(sizes) if initial_state is None else initial_state.split(list(sizes), dim=-1)
    states = [layout.first_state(y, state) for y, state in zip(like, given, strict=True)]
    body = partial(_ssd_chunks, wide=wide, features=None if features is None else features.of_chunks())
    width = sum(sizes) * (2 * chunk_size * num_groups + 2 * num_heads * head_dim)
    chunk_bytes = None if features is None else width * wide.itemsize
    (y,), finals = layout.run_chunks(body, [layout.to_chunks(z) for z in inputs], states, chunk_bytes)
    return layout.from_chunks(y, batch).to(x.dtype), join(finals, dim=-1)


def _ssd_chunks(
    run: ChunkRun,
    chunks: Sequence[torch.Tensor],
    states: Sequence[torch.Tensor],
    *,
    wide: torch.dtype,
    features: Features | None,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Run a group of chunks ``dt A, dt x, B, C [num_chunks, H or G, C, .]``, from the states of each block of rows."""
    decay_log, x_dt, B, C = (y.to(wide) for y in chunks)
    blocks = [(B, C)]
    if features is not None:
        added_C, added_B = linear_products(C, B, features)
        blocks.append((added_B, added_C))
    num_groups, num_heads, head_dim = B.shape[1], *x_dt.shape[1::2]
    b = decay_log.squeeze(-1).cumsum(dim=-1)
    total = b[..., -1:]
    decay = causal_decay(b.unsqueeze(-1), b.unsqueeze(-2))
    shared = join_sum([C @ B.transpose(-1, -2) for B, C in blocks])
    scores = shared.unsqueeze(2) * decay.unflatten(1, (num_groups, -1))
    within = scores.flatten(1, 2) @ x_dt
    # [chunks, G, (H/G) P, C] @ [chunks, G, C, N]
    decayed = _fold_heads(x_dt * (total - b).exp().unsqueeze(-1), num_groups)
    reads, finals = [], []
    for (B, C), state in zip(blocks, states, strict=True):
        update = (decayed.transpose(-1, -2) @ B).flatten(1, 2).unflatten(1, (num_heads, head_dim))
        starts, final = run.carry(total.exp().unsqueeze(-1), update, state)
        folded = starts.flatten(1, 2).unflatten(1, (num_groups, -1))
        reads.append(C @ folded.transpose(-1, -2))
        finals.append(final)
    across = join_sum(reads).unflatten(-1, (-1, head_dim)).transpose(2, 3).flatten(1, 2)
    return [within + across * b.exp().unsqueeze(-1)], finals


def _fold_heads(x: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Return ``[chunks, G, C, (H/G) P]`` from ``[chunks, H, C, P]``."""
    return x.unflatten(1, (num_groups, -1)).transpose(2, 3).flatten(-2, -1)
