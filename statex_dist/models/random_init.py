"""Random values that depend on a seed and a tensor's name, never on the order in which tensors are made."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch


def generator_for(seed: int, name: str) -> torch.Generator:
    """Return a CPU generator whose stream is fixed by ``seed`` and ``name``."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def normal(shape: Sequence[int], *, std: float, dtype: torch.dtype, rng: torch.Generator) -> torch.Tensor:
    """Return N(0, std^2) values, drawn in fp32 so that every dtype rounds the same numbers."""
    return torch.randn(*shape, generator=rng).mul_(std).to(dtype)


def uniform(shape: Sequence[int], *, bound: float, dtype: torch.dtype, rng: torch.Generator) -> torch.Tensor:
    """Return values uniform in ``(-bound, bound)``, drawn in fp32 so that every dtype rounds the same numbers."""
    return torch.rand(*shape, generator=rng).mul_(2).sub_(1).mul_(bound).to(dtype)
