"""Tensors of a state dict in one ``torch.save`` file: a plain-engine checkpoint, or a public ``pytorch_model.bin``."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from checkpoints_tools.pickle_io import TorchFile, bytes_of, dtype_of
from checkpoints_tools.tensor_io import SourceFacts, TensorInfo
from statex_dist.errors import CheckpointError


class StateDictSource:
    """A state dict in one file.

    Args:
        path: The file.
        key: Entry of the file that holds the state dict; None where the file is one.
        facts: What is known about the checkpoint.

    Raises:
        CheckpointError: The file is missing, damaged, refused or holds no state dict.
    """

    def __init__(self, path: Path, *, key: str | None, facts: SourceFacts):
        self._file = TorchFile(path)
        content: Any = self._file.content
        module = content if key is None else content.get(key) if isinstance(content, dict) else None
        if not isinstance(module, dict) or not all(isinstance(v, torch.Tensor) for v in module.values()):
            raise CheckpointError(f"{path} holds no state dict" + (f" under '{key}'" if key else ""))
        self._tensors: dict[str, torch.Tensor] = module
        self._facts = facts
        self._contiguous = lru_cache(maxsize=1)(lambda name: bytes_of(self._tensors[name]))
        owners: dict[tuple[Any, ...], str] = {}
        self._aliases: dict[str, str] = {}
        for name, tensor in module.items():
            place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            owner = owners.setdefault(place, name)
            if owner != name and tensor.numel():
                self._aliases[name] = owner

    @property
    def facts(self) -> SourceFacts:
        """What is known about the checkpoint."""
        return self._facts

    @property
    def aliases(self) -> Mapping[str, str]:
        """Names that share their memory with an earlier one."""
        return self._aliases

    @property
    def files(self) -> list[Path]:
        """The one file."""
        return [self._file.path]

    def keys(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._tensors)

    def info(self, name: str) -> TensorInfo:
        """Return shape and dtype of a tensor."""
        tensor = self._tensors[name]
        return TensorInfo(name=name, shape=tuple(tensor.shape), dtype=dtype_of(tensor))

    def read_into(self, name: str, start: int, view: memoryview) -> None:
        """Fill ``view`` with the bytes of a tensor from byte ``start`` on."""
        tensor = self._tensors[name]
        if tensor.is_contiguous():
            self._file.read(tensor, view, start)
        else:
            # Transposed weights are copied whole, and kept until the next such tensor is asked for.
            view[:] = self._contiguous(name)[start : start + len(view)]
