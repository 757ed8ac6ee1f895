"""The operations between the scans, in one kernel each on a GPU: norms with and without a gate, and SwiGLU.

In PyTorch each is a chain of operators, and autograd keeps the wide intermediates of all of them. The kernels of
flash-linear-attention keep only what they are given. Bytes kept for the backward pass, per token, in bf16, for a norm
over ``D`` channels and an MLP of ``I``:

============================  ========  =======
piece                         PyTorch   kernel
============================  ========  =======
RMS norm                      6 D + 4   2 D + 4
RMS norm, then SiLU gate      20 D + 4  4 D + 4
RMS norm, then sigmoid gate   16 D + 4  4 D + 4
SiLU gate, then RMS norm      18 D + 4  4 D + 4
SwiGLU and the product of it  8 I       6 I
============================  ========  =======

Kernels compute in fp32 and round once; the PyTorch norms round before the weight as well. float64, tensors on a CPU and
rows above 64 KiB stay with PyTorch. The kernels' offsets have 64 bits, so no length is too long for them.
"""

from __future__ import annotations

import torch

from statex_dist.ops import backends
from statex_dist.ops.fla_api import fla_gated_rms_norm, fla_rms_norm, fla_swiglu, has_fla
from statex_dist.ops.precision import torch_gated_rms_norm, torch_rms_norm, torch_swiglu

_ROW_BYTES = 65536
"""The norms' kernels hold a whole row at once and raise above this."""


def takes_kernels(x: torch.Tensor) -> bool:
    """Return whether flash-linear-attention's kernels are to run on ``x``."""
    return x.is_cuda and x.numel() > 0 and backends.takes_kernels(x, has_fla)


def _row_fits(x: torch.Tensor) -> bool:
    return x.shape[-1] * x.element_size() <= _ROW_BYTES


def rms_norm(x: torch.Tensor, weight: torch.Tensor, *, eps: float) -> torch.Tensor:
    """Return the RMS norm (arXiv 1910.07467) over the last dimension.

    Args:
        x: ``[..., D]``.
        weight: ``[D]``, of any floating dtype.
        eps: Added to the mean square.

    Returns:
        ``[..., D]`` in ``x``'s dtype.
    """
    if takes_kernels(x) and _row_fits(x):
        return fla_rms_norm(x, weight, eps=eps)
    return torch_rms_norm(x, weight, eps=eps)


def gated_rms_norm(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    *,
    eps: float,
    norm_before_gate: bool,
    sigmoid: bool = False,
    num_groups: int = 1,
) -> torch.Tensor:
    """Return an RMS norm with a gate, ``silu(gate)`` or ``sigmoid(gate)``.

    Args:
        x: ``[..., D]``.
        gate: ``[..., D]``.
        weight: ``[D]``.
        eps: Added to the mean square.
        norm_before_gate: Whether the norm is gated (GLA), or the gated is normed (Mamba2; has no kernel for a sigmoid).
        sigmoid: The gate's activation, in place of SiLU.
        num_groups: Groups of channels that are normed each by itself, as mamba_ssm does (more than one have no kernel).

    Returns:
        ``[..., D]`` in ``x``'s dtype.
    """
    if num_groups == 1 and takes_kernels(x) and _row_fits(x) and (norm_before_gate or not sigmoid):
        return fla_gated_rms_norm(x, gate, weight, eps=eps, norm_before_gate=norm_before_gate, sigmoid=sigmoid)
    return torch_gated_rms_norm(
        x, gate, weight, eps=eps, norm_before_gate=norm_before_gate, sigmoid=sigmoid, num_groups=num_groups
    )


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return ``silu(gate) * up`` (arXiv 2002.05202), all ``[..., I]``."""
    return fla_swiglu(gate, up) if takes_kernels(gate) else torch_swiglu(gate, up)
