"""What a ``torch.save`` file says about itself: a zip archive, with a CRC-32 of every entry in its directory.

torch writes those checksums and never looks at them. With them, the directory alone (a few kilobytes) stands for a file
of any size, and a damaged byte is found without having kept anything beside the file.
"""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

import xxhash

from statex_dist.errors import CheckpointError, one_line, shown

_BUFFER_BYTES = 4 << 20

DAMAGE = (
    *(OSError, zipfile.BadZipFile, ValueError, NotImplementedError),
    *(RuntimeError, EOFError, OverflowError, struct.error),
)
"""What reading a damaged archive may raise."""

WRITE_ERRORS = (OSError, RuntimeError)
"""What a full or broken disk raises; torch reports it as RuntimeError."""


def directory_digest(path: Path) -> str | None:
    """Return the xxh3-128 of an archive's directory, or None for a file that is not an archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            start = archive.start_dir
        with path.open("rb") as file:
            file.seek(start)
            return xxhash.xxh3_128(file.read()).hexdigest()
    except DAMAGE:
        return None


def check_crcs(path: Path) -> None:
    """Read an archive and compare every entry with its CRC-32.

    Raises:
        CheckpointError: An entry is not what was written, or the file is not an archive.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if info.compress_type != zipfile.ZIP_STORED:  # a few bytes of such could stand for any number
                    raise zipfile.BadZipFile(f"entry {shown(info.filename)} is compressed; torch.save compresses none")
                with archive.open(info) as entry:
                    while entry.read(_BUFFER_BYTES):
                        pass  # the check is made when the end is read
    except DAMAGE as error:
        raise CheckpointError(f"{path} is damaged: {one_line(error)}") from None
