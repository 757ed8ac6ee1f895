"""The only file that imports causal-conv1d, a compiled CUDA kernel of the convolution."""

from __future__ import annotations

import importlib.util
from functools import cache

import torch

OFFSETS = 2**31
"""Elements from which on the kernel's 32-bit offsets are no longer certain to fit."""


@cache
def has_causal_conv1d() -> bool:
    """Return whether the package and its compiled extension are installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("causal_conv1d", "causal_conv1d_cuda"))


def fits_causal_conv1d(
    x: torch.Tensor, weight: torch.Tensor, *, initial_state: torch.Tensor | None, cu_seqlens: torch.Tensor | None
) -> bool:
    """Return whether the kernel computes this case: arguments as in :func:`cuda_causal_conv`.

    It hands initial states to no packed sequence but the first.
    """
    num_channels, width = weight.shape[0], weight.shape[-1]
    return (
        x.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and num_channels % 8 == 0
        and 2 <= width <= 4
        and (cu_seqlens is None or initial_state is None)
        and x.shape[0] * x.shape[1] * max(x.stride(1), num_channels) < OFFSETS
    )


def cuda_causal_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    initial_state: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    silu: bool = False,
) -> torch.Tensor:
    """Run the convolution on causal-conv1d's kernel. Arguments and result are those of ``causal_conv``, but for these.

    Args:
        x: May be a slice of a wider row.
        initial_state: Not beside ``seq_idx``.
        seq_idx: ``[1, T]`` int32 index of each token's packed sequence, or None.
        silu: Whether a SiLU follows, in the same kernel.
    """
    from causal_conv1d import causal_conv1d_fn

    out = causal_conv1d_fn(
        _aligned(x).transpose(1, 2),
        weight.squeeze(1).to(x.dtype).contiguous(),
        None if bias is None else bias.to(x.dtype),
        seq_idx=seq_idx,
        # Their channels have to lie side by side too.
        initial_states=None if initial_state is None else _channels_last(initial_state.to(x.dtype)),
        activation="silu" if silu else None,
    ).transpose(1, 2)
    if out.requires_grad:
        out.register_hook(_aligned)  # the kernel makes the same demands on the gradient
    return out


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """Return ``x [B, T, D]``, copied unless rows begin at multiples of the 16 bytes that the kernel reads at once."""
    if x.stride(2) == 1 and x.stride(0) % 8 == 0 and x.stride(1) % 8 == 0 and x.data_ptr() % 16 == 0:
        return x
    # contiguous() would leave the strides of axes of length 1 as they are.
    return x.clone(memory_format=torch.contiguous_format)


def _channels_last(state: torch.Tensor) -> torch.Tensor:
    return state.transpose(1, 2).contiguous().transpose(1, 2)
