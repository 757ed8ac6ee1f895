"""The one rule for the dtype of decays, states, norms and losses: at least fp32."""

from __future__ import annotations

import torch


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return fp32 for a narrower dtype, and a wider one (float64) as it is."""
    return torch.promote_types(dtype, torch.float32)
