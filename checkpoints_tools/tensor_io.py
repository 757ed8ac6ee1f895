"""The one logical layer of the offline tools: named tensors, read and written one at a time.

A source knows the shape and dtype of every tensor before it reads any, and a sink is told all of them before it writes
any; so files are laid out once, memory is bounded by the largest tensor, and a tool can refuse a checkpoint that does
not fit before it has written a byte. Formats are further files of this folder; :mod:`checkpoints_tools.sources`
recognises them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from statex_dist.errors import ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What ``--dtype`` accepts."""

Progress = Callable[[int, int], None]
"""Called with the bytes written so far and in all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorInfo:
    """Name, shape and dtype of one tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFacts:
    """What is known about a checkpoint besides its tensors.

    Attributes:
        kind: ``hf`` (safetensors), ``zero3`` (DeepSpeed) or ``plain`` (one process, no DeepSpeed).
        path: Directory of the weight files.
        model_dir: Directory with ``config.json`` and tokenizer files, or None where the checkpoint has no such.
        verified: Whether a manifest was there and every weight file agreed with it.
        info: Facts of the writer: step, world size, manifest entries.
    """

    kind: str
    path: Path
    model_dir: Path | None
    verified: bool
    info: dict[str, Any] = field(default_factory=dict)


class TensorSource(Protocol):
    """A checkpoint that is read one tensor at a time."""

    @property
    def facts(self) -> SourceFacts:
        """What is known about the checkpoint."""

    @property
    def aliases(self) -> Mapping[str, str]:
        """Tied names, each with the name that owns the values; both are among :meth:`keys`."""

    def keys(self) -> list[str]:
        """Return the names of all tensors, in the checkpoint's order."""

    def info(self, name: str) -> TensorInfo:
        """Return shape and dtype of a tensor without reading it."""

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor in memory of its own."""


class TensorSink(Protocol):
    """A checkpoint that is written one tensor at a time.

    All infos are declared when the sink is made; the order of the writes is free.
    """

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one of the declared tensors."""

    def finish(self) -> list[Path]:
        """Flush everything to disk and return the files; every declared tensor must have been written."""

    def close(self) -> None:
        """Release the files without finishing them; harmless after :meth:`finish`."""


def parse_dtype(text: str | None) -> torch.dtype | None:
    """Return the dtype that a ``--dtype`` value names; None keeps each tensor's own.

    Raises:
        ConfigError: An unknown name.
    """
    if text is None:
        return None
    if text not in DTYPES:
        raise ConfigError(f"--dtype {text!r} is not supported; allowed: {', '.join(DTYPES)}")
    return DTYPES[text]


def stored_dtype(dtype: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """Return the dtype to store: ``wanted`` for floating-point values, else their own."""
    return wanted if wanted is not None and dtype.is_floating_point else dtype


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name without ``torch.``, as ``config.json`` spells it."""
    return str(dtype).removeprefix("torch.")


def total_bytes(infos: Iterable[TensorInfo]) -> int:
    """Return the bytes of all tensors together."""
    return sum(info.nbytes for info in infos)
