"""Tensor bytes to and from files at given offsets, without a second copy in memory."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from statex_dist.errors import CheckpointError

BLOCK_BYTES = 16 << 20


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor as writable bytes."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def read_into(tensor: torch.Tensor, path: Path, offset: int) -> None:
    """Fill a contiguous tensor with the bytes of ``path`` from ``offset`` on.

    Raises:
        CheckpointError: The file cannot be read, or ends before the tensor does.
    """
    view = as_bytes(tensor)
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    try:
        done = 0
        while done < len(view):
            count = os.preadv(descriptor, [view[done : done + BLOCK_BYTES]], offset + done)
            if not count:
                raise CheckpointError(f"{path} is truncated: it ends at byte {offset + done}, inside a tensor")
            done += count
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    finally:
        os.close(descriptor)


def write_from(tensor: torch.Tensor, descriptor: int, offset: int) -> None:
    """Write a contiguous tensor's bytes to an open file at ``offset``."""
    view = as_bytes(tensor)
    done = 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done : done + BLOCK_BYTES], offset + done)
