"""Texts of a batch with padding: one behind the other for the layers, and in rows again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from statex_dist.models.core.sequences import Sequences


@dataclass(frozen=True, kw_only=True)
class TokenSpan(Sequences):
    """The tokens that a layer is given; texts of a batch with padding are one behind the other, without it."""

    output_states: bool = True

    def to(self, device: Any, non_blocking: bool = False) -> TokenSpan:
        """Return a copy on another device; accelerate moves the arguments of layers that are spread over devices."""
        borders = self.cu_seqlens
        return TokenSpan(cu_seqlens=None if borders is None else borders.to(device, non_blocking=non_blocking))


def in_rows(x: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
    """Return ``[B, T, D]`` with zeros for padding from ``x [1, tokens, D]``; without padding ``x`` as it is."""
    return x if keep is None else x.new_zeros(*keep.shape, x.shape[-1]).index_put((keep,), x.squeeze(0))
