"""Causal depthwise convolution over packed sequences in PyTorch: no tap reads across a border.

``kernel_size`` is 3 or 4 in every model of these families, so the convolution is a sum of that many shifted and masked
products, which on a CPU is faster than the grouped ``conv1d`` and its gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from statex_dist.ops.cu_seqlens import borders_of


def causal_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Convolve each channel with its own causal kernel.

    Args:
        x: ``[B, T, D]`` inputs.
        weight: ``[D, 1, W]``, the last tap on the current token (torch's and causal-conv1d's order).
        bias: ``[D]`` or None.
        initial_state: ``[S, D, W - 1]`` inputs before each sequence's first token, zero where None.
        cu_seqlens: ``[S + 1]`` borders of packed sequences; ``B`` must be 1.

    Returns:
        ``[B, T, D]``.
    """
    width = weight.shape[-1]
    taps = weight.squeeze(1).to(x.dtype).unbind(-1)
    position = None if cu_seqlens is None else _positions(cu_seqlens, x.shape[1])
    out = x * taps[-1]
    for shift in range(1, min(width, x.shape[1])):
        earlier = F.pad(x[:, :-shift], (0, 0, shift, 0))
        if position is not None:
            earlier = earlier * (position >= shift).to(x.dtype).unsqueeze(-1)
        out = out + earlier * taps[width - 1 - shift]
    if bias is not None:
        out = out + bias.to(x.dtype)
    if initial_state is None or width == 1:
        return out
    # The convolution is linear: what the tails add to the first W - 1 tokens of each sequence is computed apart.
    tail = torch.cat([initial_state, torch.zeros_like(initial_state)], dim=-1).to(x.dtype)
    added = F.conv1d(tail, weight.to(x.dtype), groups=weight.shape[0])[..., : width - 1].transpose(1, 2)
    if cu_seqlens is None:
        count = min(width - 1, x.shape[1])
        return out + F.pad(added[:, :count], (0, 0, 0, x.shape[1] - count))
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff()
    offset = torch.arange(width - 1, device=x.device)
    inside = (offset < lengths.unsqueeze(1)).flatten()
    places = (starts.unsqueeze(1) + offset).flatten()[inside]
    return out.index_add(1, places, added.flatten(0, 1)[inside].unsqueeze(0))


def conv_tail(
    x: torch.Tensor,
    kernel_size: int,
    *,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the state after ``x``: the last ``kernel_size - 1`` inputs of each sequence, ``[S, D, W - 1]``."""
    need = kernel_size - 1
    if cu_seqlens is None:
        last = x[:, max(0, x.shape[1] - need) :].transpose(1, 2)
        before = last.new_zeros(*last.shape[:2], need) if initial_state is None else initial_state.to(x.dtype)
        return torch.cat([before[..., last.shape[-1] :], last], dim=-1)
    tails = []
    for i, (start, stop) in enumerate(borders_of(cu_seqlens)):
        row = x[0, start:stop]
        before = row.new_zeros(need, row.shape[1]) if initial_state is None else initial_state[i].to(row.dtype).T
        tails.append(torch.cat([before, row[-need:] if need else row[:0]])[-need:].T if need else before.T)
    return torch.stack(tails)


def _positions(cu_seqlens: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Return each token's position within its sequence, ``[T]``."""
    starts = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff(), output_size=num_tokens)
    return torch.arange(num_tokens, device=cu_seqlens.device) - starts


def conv_step(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, tail: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Convolve one token ``[B, 1, D]`` behind ``tail [B, D, W - 1]``: no more than its window is looked at."""
    window = torch.cat([tail.to(x.dtype), x.transpose(1, 2)], dim=-1)
    out = (window * weight.squeeze(1).to(x.dtype)).sum(dim=-1)
    if bias is not None:
        out = out + bias.to(x.dtype)
    return out.unsqueeze(1), window[..., 1:]
