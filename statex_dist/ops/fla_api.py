"""The only file that imports flash-linear-attention's kernels (package fla-core)."""

from __future__ import annotations

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
