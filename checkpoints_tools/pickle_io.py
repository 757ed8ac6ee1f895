"""Reading ``torch.save`` files of unknown origin, without running their code and without holding their tensors.

A pickle may call anything; torch's ``weights_only`` unpickler calls only what it knows. DeepSpeed's optimizer files
name three more classes, none of which we need: stubs stand in for them, so deepspeed is not imported. Tensors are
mapped, not loaded, and their bytes are then read from the file at the mapped place: pages of a mapping would count as
our memory.
"""

from __future__ import annotations

import enum
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from checkpoints_tools.raw_io import FileState, read_into
from checkpoints_tools.tensor_io import TORCH_NAMES
from statex_dist.config import one_line
from statex_dist.errors import CheckpointError


class _ZeroStage(enum.IntEnum):
    """Stands in for DeepSpeed's ``ZeroStageEnum``."""

    disabled = 0
    optimizer_states = 1
    gradients = 2
    weights = 3


class _Ignored:
    """Stands in for DeepSpeed's loss scalers, whose contents no weight depends on."""


_ALLOWED: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_ZeroStage, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_Ignored, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Ignored, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
]


class TorchFile:
    """One ``torch.save`` file: its objects, with tensors that are mapped until they are read.

    Attributes:
        path: The file.
        content: What was saved.

    Args:
        path: The file.

    Raises:
        CheckpointError: The file is missing, truncated, not of torch's zip format, or needs a class not allowed.
    """

    def __init__(self, path: Path):
        self.path = path
        _check_archive(path)
        self._state = FileState.of(path.stat())
        try:
            with torch.serialization.safe_globals(_ALLOWED):
                self.content: Any = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:
            # Whatever a damaged or hostile pickle raises, the file is what is wrong.
            text = one_line(error)
            if "Weights only load failed" in text or "Unsupported global" in text:
                reason = text.partition("WeightsUnpickler error: ")[2] or text
                raise CheckpointError(
                    f"{path} is refused: its pickle needs more than tensors: {reason[:200]}"
                ) from None
            raise CheckpointError(f"{path} cannot be read: {text[:200]}") from None
        self._mappings = _mappings(path)

    def read(self, tensor: torch.Tensor, view: memoryview, start: int = 0) -> None:
        """Copy bytes of a mapped tensor without touching its pages.

        Args:
            tensor: A contiguous tensor of :attr:`content`.
            view: Receives the bytes of the flattened tensor from ``start`` on.
            start: First byte to copy.
        """
        assert tensor.is_contiguous()
        assert start + len(view) <= tensor.numel() * tensor.element_size()
        address = tensor.data_ptr() + start
        for begin, end, offset in self._mappings:
            if begin <= address and address + len(view) <= end:
                read_into(view, self.path, offset + address - begin, expected=self._state)
                return
        view[:] = bytes_of(tensor)[start : start + len(view)]


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the values of a CPU tensor as bytes."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def dtype_of(tensor: torch.Tensor) -> str:
    """Return a tensor's dtype by its name in safetensors.

    Raises:
        CheckpointError: A dtype that safetensors files do not have.
    """
    name = str(tensor.dtype).removeprefix("torch.")
    found = next((ours for ours, theirs in TORCH_NAMES.items() if theirs == name), None)
    if found is None:
        raise CheckpointError(f"dtype {name} is not supported; supported: {', '.join(TORCH_NAMES.values())}")
    return found


def _check_archive(path: Path) -> None:
    """Raise unless ``path`` is a whole, uncompressed archive in this machine's byte order."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            order = next((archive.read(e) for e in entries if e.filename.endswith("/byteorder")), b"little")
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} is truncated or not a torch.save file: {one_line(error)}") from None
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise CheckpointError(f"{path} holds compressed entries, which torch.save never writes")
    if order.decode(errors="replace") != sys.byteorder:
        raise CheckpointError(f"{path} was written on a {order!r}-endian machine; convert it there")


def _mappings(path: Path) -> list[tuple[int, int, int]]:
    """Return ``(begin, end, file offset)`` of this process's mappings of a file; empty where the system hides them."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5] == str(path.resolve()):
            begin, end = (int(part, 16) for part in fields[0].split("-"))
            found.append((begin, end, int(fields[2], 16)))
    return found
