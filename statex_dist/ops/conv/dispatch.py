"""The causal convolution as models call it: states around it, and the backend that fits.

On a GPU the PyTorch form would read and write the inputs once per tap, so a kernel runs there: causal-conv1d's where it
is installed and computes the case, else fla-core's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from statex_dist.distributed.context_group import ContextShare
from statex_dist.errors import ConfigError
from statex_dist.ops.conv.causal_conv1d_api import cuda_causal_conv, fits_causal_conv1d, has_causal_conv1d
from statex_dist.ops.conv.torch_forms import causal_conv, conv_step, conv_tail
from statex_dist.ops.cu_seqlens import read_borders, sequence_index
from statex_dist.ops.fla_api import fla_causal_conv, has_fla


def convolve_sequences(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    tail: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    output_tail: bool = False,
    context: ContextShare | None = None,
    silu: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Convolve a segment and return the state after it; arguments are those of :func:`causal_conv`.

    Args:
        tail: :func:`causal_conv`'s ``initial_state``.
        seq_idx: ``[1, T]`` int32, the borders in causal-conv1d's form, which saves its kernel deriving them.
        output_tail: Whether to return the state after ``x``.
        context: This rank's share of a pack that ranks share, or None; the states are then those before and after the
            whole pack, ``[1, D, W - 1]``.
        silu: Whether a SiLU follows the convolution; a kernel computes both at once.

    Returns:
        ``[B, T, D]`` and the state ``[S, D, W - 1]`` (None unless asked for).

    Raises:
        ConfigError: A rank's share of the tokens is shorter than the convolution.
    """
    need = weight.shape[-1] - 1
    if context is None and cu_seqlens is None and tail is not None and x.shape[1] == 1:
        out, after = conv_step(x, weight, bias, tail)
        return (F.silu(out) if silu else out), after if output_tail else None
    if context is None:
        out = _convolve(x, weight, bias, initial_state=tail, cu_seqlens=cu_seqlens, seq_idx=seq_idx, silu=silu)
        return out, conv_tail(x, need + 1, initial_state=tail, cu_seqlens=cu_seqlens) if output_tail else None
    assert cu_seqlens is not None
    if x.shape[1] < need:
        raise ConfigError(f"a rank's share of {x.shape[1]} tokens is shorter than the convolution's {need}")
    last = x[:, read_borders(cu_seqlens)[-2] :]
    before, after = context.exchange(conv_tail(last, need + 1), None, tail)
    others = before.new_zeros(len(cu_seqlens) - 2, *before.shape[1:])
    tails = torch.cat([before, others])
    out = _convolve(x, weight, bias, initial_state=tails, cu_seqlens=cu_seqlens, seq_idx=seq_idx, silu=silu)
    return out, after if output_tail else None


def _convolve(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    silu: bool,
) -> torch.Tensor:
    """Run the kernel that fits, or :func:`causal_conv`, and the SiLU where one follows."""
    if x.is_cuda and x.dtype != torch.float64 and x.shape[1]:
        states = {"initial_state": initial_state, "cu_seqlens": cu_seqlens}
        if has_causal_conv1d() and fits_causal_conv1d(x, weight, **states):
            if cu_seqlens is None:
                return cuda_causal_conv(x, weight, bias, initial_state=initial_state, silu=silu)
            seq_idx = sequence_index(cu_seqlens, x.shape[1]).int().unsqueeze(0) if seq_idx is None else seq_idx
            return cuda_causal_conv(x, weight, bias, seq_idx=seq_idx, silu=silu)
        if has_fla():
            return fla_causal_conv(x, weight, bias, **states, silu=silu)
    out = causal_conv(x, weight, bias, initial_state=initial_state, cu_seqlens=cu_seqlens)
    return F.silu(out) if silu else out
