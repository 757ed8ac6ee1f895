"""Dtypes by their names in the safetensors format, and conversion of values between them with numpy, without torch.

numpy has no bfloat16: it is the upper half of fp32, rounded to the nearest even number as torch does.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from statex_dist.errors import CheckpointError, ConfigError

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

CONVERTIBLE = ("F64", "F32", "F16", "BF16")
"""Dtypes of values that are computed with: converted, compared with a tolerance, drawn. Others are copied."""

FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


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


_NATIVE: dict[str, Any] = {"F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2")}
_BITS: dict[str, Any] = {
    "F64": np.dtype("<u8"),
    "F32": np.dtype("<u4"),
    "F16": np.dtype("<u2"),
    "BF16": np.dtype("<u2"),
}
_EXPONENT = {"F64": 0x7FF << 52, "F32": 0xFF << 23, "F16": 0x1F << 10, "BF16": 0xFF << 7}


def has_nonfinite(block: np.ndarray, dtype: str, scratch: np.ndarray | None = None) -> bool:
    """Return whether a block of bytes holds a NaN or an infinity.

    Args:
        block: ``[n]`` uint8, whole elements.
        dtype: Their dtype; integers are always finite.
        scratch: uint8 to work in, to save an allocation; not used where it is shorter than the block.
    """
    if not len(block):
        return False
    if dtype == "F8_E4M3":  # no infinity; NaN is all ones
        return bool(((block & 0x7F) == 0x7F).any())
    if dtype == "F8_E5M2":
        return bool(((block & 0x7C) == 0x7C).any())
    if dtype not in _BITS:
        return False
    bits = block.view(_BITS[dtype])
    out = None if scratch is None or len(scratch) < len(block) else scratch[: len(block)].view(_BITS[dtype])
    exponent = np.bitwise_and(bits, bits.dtype.type(_EXPONENT[dtype]), out=out)
    return bool(exponent.max() == _EXPONENT[dtype])


def cast(block: np.ndarray, source: str, target: str) -> np.ndarray:
    """Return a block of bytes in another dtype, rounded to the nearest even.

    Args:
        block: ``[n]`` uint8, whole elements of ``source``.
        source: Dtype that they have.
        target: Dtype that they get.

    Raises:
        CheckpointError: A dtype that is copied but not converted (float8, integers).
    """
    if source == target:
        return block
    for dtype in (source, target):
        if dtype not in _BITS:
            raise CheckpointError(f"values of dtype {dtype} are not converted; supported: {', '.join(_BITS)}")
    if source == "BF16":
        wide = (block.view("<u2").astype("<u4") << 16).view("<f4")
    else:
        wide = block.view(_NATIVE[source])
    return encode(wide, target)


def encode(values: np.ndarray, target: str) -> np.ndarray:
    """Return floating-point values as bytes of another dtype.

    Raises:
        CheckpointError: A dtype that values cannot be converted to.
    """
    if target not in _BITS:
        raise CheckpointError(f"values cannot be converted to dtype {target}; supported: {', '.join(_BITS)}")
    with np.errstate(over="ignore"):  # what overflows becomes infinite, which the caller looks for
        if target != "BF16":
            return np.ascontiguousarray(values.astype(_NATIVE[target], copy=False)).view(np.uint8)
        bits = np.ascontiguousarray(values.astype("<f4", copy=False)).view("<u4")
    rounded = bits >> 16
    rounded &= 1
    rounded += bits
    rounded += 0x7FFF
    rounded >>= 16
    result = rounded.astype("<u2")
    if (nan := np.isnan(bits.view("<f4"))).any():
        result[nan] = 0x7FC0
    return result.view(np.uint8)
