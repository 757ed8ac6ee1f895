"""The only file that imports flash-linear-attention's kernels (package fla-core)."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from functools import cache
from typing import Any

import torch

# The fused recurrent kernel keeps partial outputs of every key block: cheap for a few tokens, ruinous for many.
_RECURRENT_TOKENS = 64


@cache
def has_fla() -> bool:
    """Return whether the GLA kernels can be imported (they need triton, not a GPU)."""
    return all(importlib.util.find_spec(name) is not None for name in ("fla", "triton"))


@cache
def delta_backward_obstacle() -> str | None:
    """Return why fla-core refuses the backward pass of the gated delta rule on this machine, or None.

    On Hopper GPUs triton 3.4 to 3.7.0 compiles it to wrong gradients (flash-linear-attention issue 640), so fla-core
    0.6 raises, unless tilelang is installed, whose kernel it then runs. KDA has another backward pass.
    """
    from fla.ops.common import chunk_o

    wrong = chunk_o.IS_NVIDIA_HOPPER and chunk_o.TRITON_ABOVE_3_4_0 and not chunk_o.TRITON_ABOVE_3_7_1
    if not wrong or importlib.util.find_spec("tilelang") is not None:
        return None
    version = importlib.metadata.version("triton")
    return (
        f"on Hopper GPUs triton {version} computes wrong gradients of the gated delta rule (flash-linear-attention "
        "issue 640); install triton 3.7.1 or newer (torch 2.12.1 and newer have it) or tilelang"
    )


def _common(scale: float, initial_state: torch.Tensor | None, cu_seqlens: torch.Tensor | None) -> dict[str, Any]:
    """Return the options of all kernels: they want fp32 states and int64 borders."""
    return {
        "scale": scale,
        "initial_state": None if initial_state is None else initial_state.float(),
        "output_final_state": True,
        "cu_seqlens": None if cu_seqlens is None else cu_seqlens.long(),
    }


def fla_gla(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    *,
    scale: float,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run gated linear attention on fla-core's Triton kernels. Arguments and results are those of ``naive_gla``."""
    from fla.ops.gla import chunk_gla, fused_recurrent_gla

    common = _common(scale, initial_state, cu_seqlens)
    if q.shape[1] <= _RECURRENT_TOKENS:
        return fused_recurrent_gla(q=q, k=k, v=v, gk=g, **common)
    return chunk_gla(q=q, k=k, v=v, g=g, **common)


def fla_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    scale: float,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the gated delta rule on fla-core's kernels. Arguments and results are those of ``naive_delta_rule``."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    from fla.ops.kda import chunk_kda

    scan, decay = (chunk_gated_delta_rule, g.squeeze(-1)) if g.shape[-1] == 1 else (chunk_kda, g)
    return scan(q=q, k=k, v=v, g=decay, beta=beta, **_common(scale, initial_state, cu_seqlens))


def fla_rms_norm(x: torch.Tensor, weight: torch.Tensor, *, eps: float) -> torch.Tensor:
    """Run an RMS norm on fla-core's kernel. Arguments and result are those of ``fused.rms_norm``."""
    from fla.modules.norm.layernorm import rms_norm

    return rms_norm(x, weight, None, eps=eps)


def fla_gated_rms_norm(
    x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, *, eps: float, norm_before_gate: bool, sigmoid: bool
) -> torch.Tensor:
    """Run a gated RMS norm on fla-core's kernels. Arguments and result are those of ``fused.gated_rms_norm``."""
    if norm_before_gate:
        from fla.modules.norm.fused_norm_gate import rms_norm_gated

        return rms_norm_gated(x, gate, weight, None, activation="sigmoid" if sigmoid else "swish", eps=eps)
    from fla.modules.norm.layernorm_gated import rmsnorm_fn

    assert not sigmoid, "the kernel has no sigmoid"
    return rmsnorm_fn(x, weight, None, z=gate, eps=eps, norm_before_gate=False)


def fla_swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return ``silu(gate) * up`` of fla-core's kernel."""
    from fla.modules.activations import swiglu

    return swiglu(gate, up)


def fla_cross_entropy_(
    logits: torch.Tensor, targets: torch.Tensor, *, ignore_index: int, gradient: bool
) -> torch.Tensor:
    """Return the losses ``[N]`` in fp32 of ``logits [N, V]`` on fla-core's kernel.

    With ``gradient`` the logits are overwritten by the gradient of the losses' sum.
    """
    from fla.modules.fused_cross_entropy.ops import cross_entropy_bwd, cross_entropy_fwd

    with torch.cuda.device_of(logits):
        losses, _, lse, *_ = cross_entropy_fwd(logits, targets, ignore_index=ignore_index)
        if gradient:
            ones = losses.new_ones(()).expand(len(targets))
            cross_entropy_bwd(logits, targets, lse, ones, ignore_index=ignore_index, inplace_backward=True)
    return losses


def fla_causal_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    silu: bool = False,
) -> torch.Tensor:
    """Run the causal convolution on fla-core's kernel. Arguments and result are those of ``conv.causal_conv``.

    With ``silu`` a SiLU follows, in the same kernel.
    """
    from fla.modules.causal_conv1d import causal_conv1d

    state = None
    if initial_state is not None:  # the kernel's states have the kernel's width; their first column is not read
        state = torch.nn.functional.pad(initial_state.to(x.dtype), (1, 0))
    out, _ = causal_conv1d(
        x,
        weight.squeeze(1).to(x.dtype),
        None if bias is None else bias.to(x.dtype),
        initial_state=state,
        activation="silu" if silu else None,
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.long(),
    )
    return out
