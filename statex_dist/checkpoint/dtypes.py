"""Dtypes by their names in the safetensors format, so that nothing here needs torch."""

from __future__ import annotations

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

CONVERTIBLE = ("F64", "F32", "F16", "BF16")
"""Dtypes whose values we compute with: converted, compared with a tolerance, drawn anew. Others are copied."""

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
