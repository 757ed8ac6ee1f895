"""Compressed files as streams of bytes: several members or frames in a row, never more than a buffer in memory."""

from __future__ import annotations

import bz2
import gzip
import io
import zlib
from pathlib import Path
from typing import BinaryIO, cast

from statex_dist.data.corpus.records import first_line

CODECS = ("zstd", "gz", "bz2")


def open_codec(path: Path, codec: str) -> BinaryIO:
    """Open a compressed file for reading; several members or frames in a row are read on.

    Raises:
        OSError: It cannot be opened. What is found wrong while reading has a type of each codec's own.
    """
    if codec == "zstd":
        # pyarrow reads frame after frame and tells a cut-off one; the `zstd` package cannot stream at all.
        import pyarrow

        return cast(BinaryIO, pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd"))
    return cast(BinaryIO, gzip.open(path) if codec == "gz" else bz2.open(path))


COMPRESSED_SUFFIXES = (".gz", ".zst")
_BUFFER_BYTES = 1 << 20


class DamagedStreamError(Exception):
    """Compressed data that is cut off or altered; the reader adds the file and the place."""


def inner_name(name: str) -> str:
    """Return a file's name without the suffix of its compression: ``a.jsonl`` for ``a.jsonl.gz``."""
    return name.rpartition(".")[0] if is_compressed(name) else name


def is_compressed(name: str) -> bool:
    """Return whether a file's name says that it is compressed."""
    return name.lower().endswith(COMPRESSED_SUFFIXES)


def open_stream(path: str) -> BinaryIO:
    """Open ``path`` for reading from its beginning, unpacking it if its name says that it is compressed.

    Reading the stream raises :class:`DamagedStreamError` where the compressed data is cut off or altered.

    Raises:
        OSError: The file cannot be opened.
    """
    if not is_compressed(path):
        return Path(path).open("rb")
    source = open_codec(Path(path), "gz" if path.lower().endswith(".gz") else "zstd")
    return cast(BinaryIO, io.BufferedReader(_Unpacked(source), _BUFFER_BYTES))


class _Unpacked(io.RawIOBase):
    def __init__(self, source: BinaryIO):
        self._source = source

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        target = memoryview(buffer)  # type: ignore[arg-type]
        try:
            data = self._source.read(len(target))
        except (EOFError, zlib.error, OSError) as error:
            text = first_line(error)
            if "too much memory" in text:
                text = "it was written with a window above 128 MiB; compress it again with zstd --long=27 or less"
            raise DamagedStreamError(text) from error
        target[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._source.close()
        super().close()
