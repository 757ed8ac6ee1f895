"""Compressed files as streams of raw bytes."""

from __future__ import annotations

import bz2
import gzip
from pathlib import Path
from typing import BinaryIO, cast

CODECS = ("zstd", "gz", "bz2")


def open_codec(path: Path, codec: str) -> BinaryIO:
    """Open a compressed file for reading; several members or frames in a row are read on.

    Args:
        path: The file.
        codec: One of :data:`CODECS`.

    Raises:
        OSError: It cannot be opened. What is found wrong while reading has a type of each codec's own.
    """
    if codec == "zstd":
        # pyarrow reads frame after frame and tells a cut-off one; the `zstd` package cannot stream at all.
        import pyarrow

        return cast(BinaryIO, pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd"))
    return cast(BinaryIO, gzip.open(path) if codec == "gz" else bz2.open(path))
