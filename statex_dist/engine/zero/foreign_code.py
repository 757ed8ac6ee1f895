"""Refuse foreign code in the files of a DeepSpeed checkpoint: its loader runs any pickle."""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch

from statex_dist.checkpoint.formats.torch_archive.pickle import GETATTR, UnsafePickleError, loads

# What DeepSpeed 0.19 pickles into its files beside tensors and builtins.
_EXPECTED_GLOBALS = {
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
}


def foreign_code(path: Path) -> str | None:
    """Return a message that names a file's code beside DeepSpeed's own classes, or None; its loader runs any pickle."""
    named = set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    foreign = named - _EXPECTED_GLOBALS - GETATTR
    if foreign:
        return f"{path} holds foreign code and is refused: {', '.join(sorted(foreign))}"
    return _wrong_getattr(path) if named & GETATTR else None


def _wrong_getattr(path: Path) -> str | None:
    """Say which ``getattr`` of a file gives more than a member of a known enum (see :data:`GETATTR`), or None."""
    try:
        with zipfile.ZipFile(path) as archive:
            loads(archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl"))))
    except UnsafePickleError as error:
        return f"{path} holds foreign code and is refused: {error}"
    return None
