"""Files whose digests are computed on their way to the disk, and back from it: no byte is read a second time for them.

``torch.save`` writes an archive from its begin to its end, the directory last and in one piece. So its digests, of the
whole file and of the directory, are those of what passes by.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO, cast

import xxhash

from statex_dist.checkpoint.formats.crc import DAMAGE
from statex_dist.checkpoint.formats.torch_archive.zip import END, ZIP64, ArchiveError, Entry, read_entries
from statex_dist.checkpoint.manifest import FileRecord
from statex_dist.errors import CheckpointError, one_line

_DIRECTORY = b"PK\x01\x02"
"""How an entry of an archive's directory begins."""

_MOST_DIRECTORY_BYTES = 32 << 20
_READ_BYTES = 8 << 20


class RecordedWriter:
    """A new file that is written from begin to end; a context manager that closes it.

    Args:
        path: The file; what is there is replaced.

    Raises:
        OSError: It cannot be made.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file: BinaryIO = path.open("wb")
        self._digest = xxhash.xxh3_128()
        self._size = 0
        self._tail: bytearray | None = None
        self._tail_start = 0

    def __enter__(self) -> RecordedWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def write(self, data: bytes | memoryview) -> int:
        """Write all of ``data``, and return its bytes."""
        self._file.write(data)
        self._digest.update(data)
        if bytes(data[:4]) == _DIRECTORY:
            self._tail, self._tail_start = bytearray(), self._size
        if self._tail is not None:
            # Values may begin as a directory does; those are longer than one, or followed by the real one.
            self._tail = self._tail + data if len(self._tail) + len(data) <= _MOST_DIRECTORY_BYTES else None
        self._size += len(data)
        return len(data)

    def flush(self) -> None:
        """Hand everything to the system."""
        self._file.flush()

    def finish(self) -> FileRecord:
        """Flush the file to disk and return its record.

        Raises:
            OSError: It cannot be written.
        """
        self._file.flush()
        os.fsync(self._file.fileno())
        tail = self._tail
        directory = None
        if tail is not None and _directory_start(tail) == self._tail_start:
            directory = xxhash.xxh3_128(tail).hexdigest()
        return FileRecord(size=self._size, xxh3_128=self._digest.hexdigest(), directory_xxh3_128=directory)


def _directory_start(tail: bytes | bytearray) -> int | None:
    """Return where an archive's directory begins, as the records at the end of the file say; None if there are none."""
    if len(tail) < END.size or not tail.startswith(b"PK\x05\x06", len(tail) - END.size):
        return None
    start: int = END.unpack_from(tail, len(tail) - END.size)[6]
    if start == ZIP64 or tail.startswith(b"PK\x06\x06", len(tail) - 98):
        start = struct.unpack_from("<Q", tail, len(tail) - 98 + 48)[0]
    return start


def read_recorded(path: Path, record: FileRecord) -> bytearray:
    """Return the contents of a file, read once and compared with its record.

    Raises:
        CheckpointError: The file is missing or another one.
        OSError: It cannot be read.
    """
    try:
        file = path.open("rb", buffering=0)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; the manifest lists it") from None
    with file:
        size = os.fstat(file.fileno()).st_size
        if size != record.size:
            raise CheckpointError(f"{path} has {size} bytes; the manifest says {record.size}")
        data, digest = bytearray(size), xxhash.xxh3_128()
        view, position = memoryview(data), 0
        while position < size:
            count = file.readinto(view[position : position + _READ_BYTES]) or 0
            if not count:
                raise CheckpointError(f"{path} ends at byte {position} of {size}")
            digest.update(view[position : position + count])
            position += count
    if record.xxh3_128 is None:
        _check_archive(path, data, record)
    elif digest.hexdigest() != record.xxh3_128:
        raise CheckpointError(f"{path} is damaged: its digest differs from the manifest")
    return data


def _check_archive(path: Path, data: bytearray, record: FileRecord) -> None:
    """Compare an archive's directory with its record, and every entry with its CRC in the directory.

    Raises:
        CheckpointError: One differs.
    """
    try:
        with zipfile.ZipFile(BytesView(data)) as archive:
            start = archive.start_dir
        if xxhash.xxh3_128(memoryview(data)[start:]).hexdigest() != record.directory_xxh3_128:
            raise CheckpointError(f"{path} is damaged or another file: its zip directory differs from the manifest")
        for name, entry in open_entries(data)[1].items():
            if zlib.crc32(memoryview(data)[entry.offset : entry.offset + entry.size]) != entry.crc:
                raise CheckpointError(f"{path} is damaged: the CRC-32 of its '{name}' is not what was written")
    except (ArchiveError, *DAMAGE) as error:
        raise CheckpointError(f"{path} is damaged: {one_line(error)}") from None


def open_entries(data: bytearray) -> tuple[str, dict[str, Entry]]:
    """Return root folder and entries of an archive in memory; errors of :func:`read_entries`."""
    return read_entries(cast("BinaryIO", BytesView(data)), len(data))


class BytesView(io.RawIOBase):
    """A file over bytes in memory, which are not copied.

    Args:
        data: The contents.
    """

    def __init__(self, data: bytearray):
        self._data, self._position = memoryview(data), 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Move to a place, and return it."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: len(self._data)}[whence]
        if base + offset < 0:
            raise ValueError(f"negative place {base + offset}")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        """Return the place."""
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        """Fill ``buffer`` with the next bytes, and return their number."""
        found = self._data[self._position : self._position + len(buffer)]
        buffer[: len(found)] = found
        self._position += len(found)
        return len(found)
