"""The only file that imports mamba_ssm's kernels.

The package's ``__init__`` imports a CUDA extension that its published builds may lack. The SSD kernels are Triton and
need none of it, so the package is entered without running its ``__init__``.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from functools import cache
from typing import Any

import torch

_INT32_LIMIT = 2**31


@cache
def has_mamba_ssm() -> bool:
    """Return whether mamba_ssm's Triton kernels are installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("mamba_ssm", "triton", "einops"))


@cache
def _scan_kernel() -> Any:
    if "mamba_ssm" not in sys.modules:
        spec = importlib.util.find_spec("mamba_ssm")
        assert spec is not None
        package = types.ModuleType("mamba_ssm")
        package.__path__ = list(spec.submodule_search_locations or [])
        package.__spec__ = spec
        sys.modules["mamba_ssm"] = package
    return importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined


def fits_mamba_ssm(
    x: torch.Tensor, B: torch.Tensor, chunk_size: int, *, cu_seqlens: torch.Tensor | None, has_initial_state: bool
) -> bool:
    """Return whether the kernel computes this case rightly.

    It indexes with int32 and gives wrong numbers without a word beyond that (mamba issue 1015), and an initial state
    reaches only the first of several packed sequences.
    """
    batch, num_tokens, num_heads, head_dim = x.shape
    rows = max(y.stride(1) for y in (x, B))  # the mixer's x, B and C are slices of one wider row
    states = batch * -(-num_tokens // chunk_size) * num_heads * head_dim * B.shape[3]
    small = batch * num_tokens * rows < _INT32_LIMIT and states < _INT32_LIMIT
    return small and (cu_seqlens is None or not has_initial_state)


def mamba_ssd(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    *,
    initial_state: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    chunk_size: int = 256,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the Mamba2 scan on mamba_ssm's Triton kernels.

    Args:
        x: ``[B, T, H, P]``; the other tensors as in ``naive_ssd``.
        seq_idx: ``[B, T]`` int32 index of each token's packed sequence, or None.
        chunk_size: Tokens per chunk.

    Returns:
        Output ``[B, T, H, P]`` and the state after the last token ``[B, H, P, N]`` (of the last packed sequence).
    """
    return _scan_kernel()(
        x,
        dt,
        A,
        B,
        C,
        chunk_size=chunk_size,
        initial_states=initial_state,
        seq_idx=seq_idx,
        return_final_states=True,
    )
