"""Short convolutions."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def causal_convolution(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, tail: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Convolve each channel with its own causal kernel.

    Args:
        x: ``[B, T, D]``.
        weight: ``[D, 1, W]``, the last tap on the current token.
        bias: ``[D]`` or None.
        tail: ``[B, W - 1, D]`` inputs before ``x``, or None for zeros.

    Returns:
        ``[B, T, D]`` and the last ``W - 1`` inputs.
    """
    width, num_tokens = weight.shape[-1], x.shape[1]
    x = F.pad(x, (0, 0, width - 1, 0)) if tail is None else torch.cat([tail.to(x.dtype), x], dim=1)
    taps = weight.squeeze(1).unbind(-1)
    out = x[:, width - 1 :] * taps[-1]
    for i in range(width - 1):
        out = out + x[:, i : i + num_tokens] * taps[i]
    # A copy: a view would keep the inputs of the whole text alive.
    return (out if bias is None else out + bias), x[:, num_tokens:].clone()
