"""Refuse foreign code in the files of a DeepSpeed checkpoint: its loader runs any pickle."""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch

from statex_dist.checkpoint.formats.torch_archive.pickle import GETATTR, UnsafePickleError, loads

_ZERO = {
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
}
_SLICES = "deepspeed.utils.tensor_fragment.fragment_address"  # param_slice_mappings
_EXPECTED_GLOBALS: dict[int, set[str]] = {0: set(), 1: {*_ZERO, _SLICES}, 2: {*_ZERO, _SLICES}, 3: _ZERO}
"""What DeepSpeed 0.19 pickles into the files of each stage beside tensors and builtins."""


def foreign_code(path: Path, stage: int = 3) -> str | None:
    """Return a message that names a file's code beside that of DeepSpeed in a stage, or None.

    DeepSpeed's loader runs any pickle.
    """
    named = set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    foreign = named - _EXPECTED_GLOBALS[stage] - GETATTR
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
