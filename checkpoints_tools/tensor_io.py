"""The one logical layer of the offline tools: named tensors, read as ranges of bytes.

A source knows the shape and dtype of every tensor before it reads any, so a target is laid out once, a checkpoint that
does not fit is refused before a byte is written, and memory is bounded by buffers, never by a tensor or the model.
Dtypes go by their names in the safetensors format, so that nothing here needs torch. Formats are further files of this
folder; :mod:`checkpoints_tools.sources` recognises them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from statex_dist.errors import ConfigError

ITEM_BYTES = {
    **{"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1},
    **{"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1, "U16": 2, "U32": 4, "U64": 8, "C64": 8},
    **{"F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1},
}
"""Every dtype that we read, by its name in safetensors, and the bytes of an element."""

TORCH_NAMES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"},
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"},
    **{"U16": "uint16", "U32": "uint32", "U64": "uint64", "C64": "complex64"},
    **{"F8_E8M0": "float8_e8m0fnu", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz"},
}
"""The same dtypes as torch and ``config.json`` spell them."""

OPTIONS = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
"""What ``--dtype`` accepts."""

FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")

Progress = Callable[[int, int], None]
"""Called with the bytes written so far and in all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorInfo:
    """Name, shape and dtype (a key of :data:`ITEM_BYTES`) of one tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def item_bytes(self) -> int:
        """Bytes of one element."""
        return ITEM_BYTES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return self.numel * self.item_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFacts:
    """What is known about a checkpoint besides its tensors.

    Attributes:
        kind: ``hf`` (safetensors), ``torch`` (``pytorch_model.bin``), ``zero3`` (DeepSpeed) or ``plain`` (one process,
            no DeepSpeed).
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
    """A checkpoint that is read one range of one tensor at a time; reading is safe from several threads."""

    @property
    def facts(self) -> SourceFacts:
        """What is known about the checkpoint."""

    @property
    def aliases(self) -> Mapping[str, str]:
        """Tied names, each with the name that owns the values; both are among :meth:`keys`."""

    @property
    def files(self) -> list[Path]:
        """The weight files."""

    def keys(self) -> list[str]:
        """Return the names of all tensors, in the checkpoint's order."""

    def info(self, name: str) -> TensorInfo:
        """Return shape and dtype of a tensor without reading it."""

    def read_into(self, name: str, start: int, view: memoryview) -> None:
        """Fill ``view`` with the bytes of a (flattened) tensor from byte ``start`` on; both are whole elements."""


def parse_dtype(text: str | None) -> str | None:
    """Return the dtype that a ``--dtype`` value names; None keeps each tensor's own.

    Raises:
        ConfigError: An unknown name.
    """
    if text is None:
        return None
    if text not in OPTIONS:
        raise ConfigError(f"--dtype {text!r} is not supported; allowed: {', '.join(OPTIONS)}")
    return OPTIONS[text]


def stored_dtype(dtype: str, wanted: str | None) -> str:
    """Return the dtype to store: ``wanted`` for floating-point values, else their own."""
    return wanted if wanted is not None and dtype in FLOATS else dtype


def total_bytes(infos: Iterable[TensorInfo]) -> int:
    """Return the bytes of all tensors together."""
    return sum(info.nbytes for info in infos)
