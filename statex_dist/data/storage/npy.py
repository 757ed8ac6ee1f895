"""``.npy`` files that may be damaged or hostile, read without unpickling and without trusting the size they claim."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MAX_HEADER = 20_000
"""Bytes in which a header ends; twice of what numpy itself accepts."""

_READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


@dataclass(frozen=True, slots=True)
class NpyHeader:
    """The header of an array file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    fortran_order: bool
    size: int


def parse_header(head: bytes) -> NpyHeader:
    """Return the header that ``head``, the first :data:`MAX_HEADER` bytes of an array or all of it, begins with.

    Raises:
        ValueError: It is none, or of a version that numpy does not write for plain numbers.
    """
    stream = io.BytesIO(head)
    try:
        version = np.lib.format.read_magic(stream)
        if version not in _READERS:
            raise ValueError(f"npy version {version[0]}.{version[1]}; allowed: 1.0, 2.0")
        shape, fortran_order, dtype = _READERS[version](stream)
    except Exception as error:
        # The header is a Python literal that numpy parses: damaged ones raise nearly anything.
        reason = str(error).partition("\n")[0].strip()
        raise ValueError(reason or f"its header raises {type(error).__name__}") from error
    return NpyHeader(dtype, shape, bool(fortran_order), stream.tell())


def read_npy(path: Path, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return the array in ``path``, which must be little-endian ``dtype`` of ``shape``.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no such array, or not as long as it claims.
    """
    expected = np.dtype(dtype).newbyteorder("<")
    with path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        header = parse_header(file.read(MAX_HEADER))
        if header.dtype != expected or header.shape != shape:
            raise ValueError(f"it holds {header.dtype} of shape {header.shape}, not {dtype} of {shape}")
        count = math.prod(shape)
        if header.size + count * expected.itemsize != size:
            raise ValueError(f"it claims {count} values of {dtype}, but has {size} bytes")
        file.seek(header.size)
        values = np.fromfile(file, expected, count)
    # A file that shrinks during the read gives too few values for this shape.
    return values.reshape(shape, order="F" if header.fortran_order else "C")
