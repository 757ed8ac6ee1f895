"""Filling the parameters of a model from a checkpoint: a block at a time, so that memory is the model and a buffer."""

from __future__ import annotations

import numpy as np
import torch

from statex_dist.checkpoint.dtypes import TORCH_NAMES
from statex_dist.checkpoint.formats.piece_io import WholeReader
from statex_dist.checkpoint.formats.tensor_io import TensorSource


def torch_dtype(dtype: str) -> torch.dtype:
    """Return torch's dtype of a name in safetensors."""
    found: torch.dtype = getattr(torch, TORCH_NAMES[dtype])
    return found


def read_into(reader: WholeReader, source: TensorSource, name: str, target: torch.Tensor) -> None:
    """Read a tensor into another one of its shape, and of any dtype and device.

    Raises:
        CheckpointError: The files cannot be read, or are damaged.
    """
    stored = torch_dtype(source.info(name).dtype)
    flat = target.detach().view(-1) if target.is_contiguous() else torch.empty(target.shape, dtype=stored).view(-1)
    if flat.device.type == "cpu" and flat.dtype == stored:
        for _ in reader.blocks(name, flat.view(torch.uint8).numpy()):
            pass  # the block is in its place
    else:
        for first, block in reader.blocks(name):
            values = torch.from_numpy(block).view(stored)
            flat[first : first + len(values)].copy_(values)
    if not target.is_contiguous():
        target.copy_(flat.view(target.shape))


def read_tensor(reader: WholeReader, source: TensorSource, name: str) -> torch.Tensor:
    """Return a whole tensor in its stored dtype; errors of :func:`read_into`."""
    info = source.info(name)
    tensor = torch.from_numpy(np.empty(info.nbytes, dtype=np.uint8)).view(torch_dtype(info.dtype)).view(info.shape)
    read_into(reader, source, name, tensor)
    return tensor
