"""Tensors of a plain-engine checkpoint (no DeepSpeed): ``plain_state.pt`` with ``{"module": state_dict}``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from checkpoints_tools.pickle_io import TorchFile
from checkpoints_tools.tensor_io import SourceFacts, TensorInfo
from statex_dist.checkpoint.layout import PLAIN_STATE_NAME
from statex_dist.errors import CheckpointError


class PlainSource:
    """One tag of a plain run; arguments as for :class:`checkpoints_tools.zero3_reader.Zero3Source`.

    Raises:
        CheckpointError: The file is missing, damaged, refused or holds no ``module``.
    """

    def __init__(
        self, directory: Path, *, model_dir: Path | None, verified: bool = False, info: dict[str, Any] | None = None
    ):
        self._file = TorchFile(directory / PLAIN_STATE_NAME)
        module = self._file.content.get("module") if isinstance(self._file.content, dict) else None
        if not isinstance(module, dict) or not all(isinstance(v, torch.Tensor) for v in module.values()):
            raise CheckpointError(f"{self._file.path} holds no state dict under 'module'")
        self._tensors: dict[str, torch.Tensor] = module
        owners: dict[tuple[int, torch.Size], str] = {}
        self._aliases: dict[str, str] = {}
        for name, tensor in module.items():
            owner = owners.setdefault((tensor.data_ptr(), tensor.shape), name)
            if owner != name and tensor.numel():
                self._aliases[name] = owner
        self._facts = SourceFacts(
            kind="plain", path=directory, model_dir=model_dir, verified=verified, info=dict(info or {})
        )

    @property
    def facts(self) -> SourceFacts:
        """What is known about the checkpoint."""
        return self._facts

    @property
    def aliases(self) -> Mapping[str, str]:
        """Names that share their memory with an earlier one."""
        return self._aliases

    def keys(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._tensors)

    def info(self, name: str) -> TensorInfo:
        """Return shape and dtype of a tensor."""
        tensor = self._tensors[name]
        return TensorInfo(name=name, shape=tuple(tensor.shape), dtype=tensor.dtype)

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor."""
        tensor = self._tensors[name]
        if not tensor.is_contiguous():
            return tensor.clone(memory_format=torch.contiguous_format)
        out = torch.empty(tensor.numel(), dtype=tensor.dtype)
        self._file.read(tensor, out)
        return out.view(tensor.shape)
