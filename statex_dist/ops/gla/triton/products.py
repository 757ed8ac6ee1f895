"""Batched products of a segment's chunks, with old channels and features apart.

A sum over the old channels is rounded as it is without features, and products of channels without a gain add exact
zeros to it.
"""

from __future__ import annotations

import torch


def products(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return ``x @ y`` of ``[H, n, ., .]`` tensors as one batched product."""
    return torch.bmm(x.flatten(0, 1), y.flatten(0, 1)).unflatten(0, x.shape[:2])


def _old_and_added(x: torch.Tensor, old: int, dim: int) -> list[torch.Tensor]:
    """Return the old channels of ``x`` and, where it has them, its products."""
    parts = x.split([size for size in (old, x.shape[dim] - old) if size], dim=dim)
    # A CPU rounds a sum by where its numbers lie: a copy has the order of dimensions in memory that ``x`` has.
    return list(parts) if x.is_cuda else [part.clone() for part in parts]


def inner_products(x: torch.Tensor, y: torch.Tensor, old: int) -> torch.Tensor:
    """Return ``x @ y`` of ``[H, n, C, K]`` and ``[H, n, K, W]``, the sum over the first ``old`` channels first."""
    first, *others = zip(_old_and_added(x, old, -1), _old_and_added(y, old, -2), strict=True)
    total = products(*first)
    for x_part, y_part in others:
        total.flatten(0, 1).baddbmm_(x_part.flatten(0, 1), y_part.flatten(0, 1))
    return total


def outer_products(x: torch.Tensor, y: torch.Tensor, old: int) -> torch.Tensor:
    """Return ``x^T @ y [H, n, K, W]`` of ``[H, n, C, K]`` and ``[H, n, C, W]``, the first ``old`` rows apart."""
    parts = _old_and_added(x, old, -1)
    if len(parts) == 1:
        return products(x.mT, y)
    if not x.is_cuda:
        return torch.cat([products(part.mT, y) for part in parts], dim=2)
    out = y.new_empty(*x.shape[:2], x.shape[-1], y.shape[-1])
    for part, rows in zip(parts, out.split([part.shape[-1] for part in parts], dim=2), strict=True):
        torch.bmm(part.mT.flatten(0, 1), y.flatten(0, 1), out=rows.flatten(0, 1))
    return out
