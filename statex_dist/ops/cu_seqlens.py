"""Packed sequences by their borders ``cu_seqlens [S + 1]``: as numbers of this process, and token by token."""

from __future__ import annotations

import itertools

import torch
from torch.utils.weak import WeakTensorKeyDictionary


def read_borders(cu_seqlens: torch.Tensor) -> tuple[int, ...]:
    """Return borders as numbers. Every layer asks for those of the same tensor: a GPU is waited for only once."""
    if cu_seqlens.is_inference():  # its changes are not counted
        return tuple(cu_seqlens.tolist())
    version = cu_seqlens._version
    known = _BORDERS.get(cu_seqlens)
    if known is None or known[0] != version:
        known = _BORDERS[cu_seqlens] = (version, tuple(cu_seqlens.tolist()))
    return known[1]


_BORDERS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Borders that were read, with the version of their tensor at that time."""


def borders_of(cu_seqlens: torch.Tensor) -> list[tuple[int, int]]:
    """Return ``(start, stop)`` of each packed sequence."""
    return list(itertools.pairwise(read_borders(cu_seqlens)))


def sequence_lengths(batch: int, num_tokens: int, cu_seqlens: torch.Tensor | None) -> tuple[int, ...]:
    """Return the lengths of all sequences of a batch, packed or not."""
    if cu_seqlens is None:
        return (num_tokens,) * batch
    if batch != 1:
        raise ValueError(f"packed sequences (cu_seqlens) need a batch of 1, not {batch}")
    marks = read_borders(cu_seqlens)
    if marks[0] != 0 or marks[-1] != num_tokens or any(b < a for a, b in itertools.pairwise(marks)):
        raise ValueError(f"cu_seqlens must rise from 0 to the number of tokens {num_tokens}, not {list(marks)}")
    return tuple(b - a for a, b in itertools.pairwise(marks))


def sequence_index(cu_seqlens: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Return the index of each token's sequence, ``[T]`` int64 (mamba_ssm's ``seq_idx``, but for the dtype)."""
    index = torch.arange(num_tokens, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].to(index.dtype), index, right=True)
