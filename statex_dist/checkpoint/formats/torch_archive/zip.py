"""``torch.save`` files: zip archives of one pickle and the raw bytes of the storages, all uncompressed.

Read without torch.
(Format: PyTorch, ``caffe2/serialize/inline_container.cc``; PKWARE APPNOTE for the archive.)
"""

from __future__ import annotations

import contextlib
import os
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from statex_dist.checkpoint.dtypes import ITEM_BYTES
from statex_dist.checkpoint.formats.crc import DAMAGE
from statex_dist.checkpoint.formats.places import pointer_text
from statex_dist.checkpoint.formats.raw_io import FileState, read_bytes
from statex_dist.checkpoint.formats.torch_archive.pickle import MAX_PICKLE_BYTES, UnsafePickleError, loads
from statex_dist.errors import CheckpointError, one_line

LOCAL = struct.Struct("<IHHHHHIIIHH")
END = struct.Struct("<IHHHHIIH")
LOCATOR = struct.Struct("<IIQI")
_LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""How a file begins that torch wrote before version 1.6, or was told to write so: its magic number, pickled."""

_MAX_DIRECTORY_BYTES = 32 << 20
UTF8 = 0x0800
_KNOWN_FLAGS = UTF8 | 0x0008  # names in UTF-8; sizes and CRC stand behind the values too

ZIP64 = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of an archive: where its bytes begin in the file on disk, how many there are, and their CRC-32."""

    offset: int
    size: int
    crc: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TorchArchive:
    """One ``torch.save`` file, or one inside a larger file.

    Attributes:
        path: The file.
        root: Name of the archive's folder. torch takes the file's own name when it saves, so that a file which was
            renamed later still shows its original name.
        entries: By name below the root (``data.pkl``, ``data/0``, ...).
        state: State of the file when it was opened.
        content: The saved object, with tensors as references.
    """

    path: Path
    root: str
    entries: Mapping[str, Entry]
    state: FileState
    content: Any = field(repr=False)

    def storage(self, key: str) -> Entry:
        """Return where a storage lies.

        Raises:
            CheckpointError: The archive has no such storage.
        """
        entry = self.entries.get(f"data/{key}")
        if entry is None:
            raise CheckpointError(f"{self.path} is damaged: the bytes of its storage {key} are missing")
        return entry


class ArchiveError(Exception):
    """A fault of an archive: a verdict that fits behind the archive's name (``is damaged``), and the reason."""

    def __init__(self, verdict: str, why: str):
        self.why = " ".join(why.split())
        super().__init__(f"{verdict}: {self.why}")


def open_archive(path: Path) -> TorchArchive:
    """Read the directory and the pickle of a ``torch.save`` file.

    Raises:
        CheckpointError: The file is missing, truncated, not of torch's format, damaged, or needs more than data.
    """
    with _opened(path) as (file, size):
        root, entries = read_entries(file, size)
        content = read_content(file, entries)
        state = FileState.of(os.fstat(file.fileno()))
    return TorchArchive(path=path, root=root, entries=entries, state=state, content=content)


def read_directory(path: Path) -> tuple[str, dict[str, Entry]]:
    """Return the root folder and the entries of an archive, after checking that they lie in it without overlap.

    Raises:
        CheckpointError: The file is missing, truncated, or its directory is not one that torch writes.
    """
    with _opened(path) as (file, size):
        return read_entries(file, size)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """Open a file, and name it in the errors that reading it raises."""
    try:
        with path.open("rb") as file:
            yield file, os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except UnsafePickleError as error:
        raise CheckpointError(f"{path} is refused: its pickle needs more than tensors: {one_line(error)}") from None
    except ArchiveError as error:
        raise CheckpointError(f"{path} {error}") from None
    except DAMAGE as error:
        raise CheckpointError(
            _other_format(path) or f"{path} is truncated or not a torch.save file: {one_line(error)}"
        ) from None


def _other_format(path: Path) -> str | None:
    """Return what a file is that is no archive, as far as we know it, and how to make one of it."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        start = file.read(len(_LEGACY))
    if start == _LEGACY:
        return (
            f"{path} is in torch's format from before version 1.6, which is no archive; convert it: python -c \"import "
            "sys, torch; p = sys.argv[1]; torch.save(torch.load(p, 'cpu', weights_only=True), p)\" FILE"
        )
    return pointer_text(path)


def read_entries(file: BinaryIO, size: int) -> tuple[str, dict[str, Entry]]:
    """Return the root folder and the entries of an archive, after checking that they lie in it without overlap.

    Args:
        file: The archive, or a slice of a larger file.
        size: Its bytes.

    Raises:
        ArchiveError: It is not as torch writes it. (Or any of
            :data:`statex_dist.checkpoint.formats.crc.DAMAGE`: it is not an archive.)
    """
    _check_directory_size(file, size)
    with zipfile.ZipFile(file) as archive:
        infos, start = archive.infolist(), archive.start_dir
    _check_end(file, start, len(infos))
    if not all(0 <= info.header_offset < size for info in infos):
        raise ArchiveError("is damaged", "its directory names places outside the file")
    roots = {info.filename.partition("/")[0] for info in infos}
    if len(roots) != 1:
        raise ArchiveError("is not a torch.save file", f"its entries lie in {len(roots)} folders")
    entries: dict[str, Entry] = {}
    position = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        name, begin = info.filename.partition("/")[2], _local_header(file, info)
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise ArchiveError("holds compressed entries", "torch.save never writes such")
        if name in entries:
            raise ArchiveError("is damaged", f"it holds '{name[:80]}' twice")
        if begin is None or not _is_plain(info):
            raise ArchiveError("is damaged", f"no header where its entry '{name[:80]}' begins, or another one")
        if info.header_offset < position or begin + info.file_size > start:
            raise ArchiveError("is damaged", f"its entry '{name[:80]}' overlaps another or the directory")
        position = begin + info.file_size
        entries[name] = Entry(begin, info.file_size, info.CRC)
    return roots.pop(), entries


def _is_plain(info: zipfile.ZipInfo) -> bool:
    """Return whether an entry is a plain file, not encrypted and in this archive."""
    known = not info.flag_bits & ~_KNOWN_FLAGS and info.extract_version <= 45
    return known and not info.volume and not info.external_attr & 0x10


def read_content(file: BinaryIO, entries: Mapping[str, Entry], *, most: int = MAX_PICKLE_BYTES) -> Any:
    """Return what was saved in an archive, with tensors as references to storages that it has.

    Args:
        file: The archive.
        entries: Its entries.
        most: Bytes of its pickle, at most.

    Raises:
        ArchiveError: The pickle or a storage is missing or damaged, or is of another byte order.
        UnsafePickleError: The pickle needs more than data.
    """
    for name in ("data.pkl", "version"):
        if name not in entries:
            raise ArchiveError("is not a torch.save file", f"it has no {name}")
    if (order := entries.get("byteorder")) and (found := _read(file, order, 16)) != sys.byteorder.encode():
        raise ArchiveError("cannot be read here", f"it was written on a {found!r}-endian machine; convert it there")
    pickled = entries["data.pkl"]
    if pickled.size > most:
        raise ArchiveError("is not what was expected", f"its pickle has {pickled.size} bytes; at most {most} are read")
    data = _read(file, pickled, most)
    if zlib.crc32(data) != pickled.crc:
        raise ArchiveError("is damaged", "the CRC of its data.pkl is not what was written")
    content, storages = loads(data)
    for storage in storages:
        stored = entries.get(f"data/{storage.key}")
        if stored is None or stored.size < storage.numel * ITEM_BYTES[storage.dtype]:
            raise ArchiveError("is damaged", f"the bytes of its storage {storage.key} are missing")
    return content


def _read(file: BinaryIO, entry: Entry, most: int) -> bytes:
    file.seek(entry.offset)
    return file.read(min(entry.size, most))


def _check_directory_size(file: BinaryIO, size: int) -> None:
    """Raise if the directory of an archive is too large to make an object of each entry.

    Raises:
        zipfile.BadZipFile: It is, or no end record is where torch writes it.
    """
    file.seek(max(size - 98, 0))
    tail = file.read(98)
    if len(tail) < END.size or not tail.startswith(b"PK\5\6", len(tail) - END.size):
        raise zipfile.BadZipFile("it does not end with the directory of an archive")
    length = END.unpack_from(tail, len(tail) - END.size)[5]
    if tail.startswith(b"PK\6\6") and tail.startswith(b"PK\6\7", 56):
        length = struct.unpack_from("<Q", tail, 40)[0]
    if length > _MAX_DIRECTORY_BYTES:
        raise zipfile.BadZipFile(f"a directory of {length} bytes; at most {_MAX_DIRECTORY_BYTES} are read")


def _check_end(file: BinaryIO, start: int, count: int) -> None:
    """Raise unless the end of an archive is of this directory: torch reads it strictly, zipfile does not.

    Raises:
        zipfile.BadZipFile: It is not.
    """
    file.seek(start)
    tail = file.read(_MAX_DIRECTORY_BYTES)
    position = 0
    for _ in range(count):
        position += 46 + sum(struct.unpack_from("<HHH", tail, position + 28))
    directory, end = position, len(tail) - END.size
    fits = position <= end
    if fits and tail.startswith(b"PK\6\6", position):
        *disks, here, total, length, offset = struct.unpack_from("<IIQQQQ", tail, position + 16)
        lengths = struct.unpack_from("<Q", tail, position + 4)
        locator = LOCATOR.unpack_from(tail, position + 56)
        fits = (here, total, length, offset, *disks, *lengths) == (count, count, directory, start, 0, 0, 44)
        fits = fits and locator == (0x07064B50, 0, start + position, 1)
        position += 76
    found = END.unpack_from(tail, end)
    small = (min(count, 0xFFFF), min(count, 0xFFFF), min(directory, ZIP64), min(start, ZIP64))
    # The short record may point to the long one even where its own fields would do.
    large = (0xFFFF, 0xFFFF, ZIP64, ZIP64)
    sizes_fit = all(value in pair for value, *pair in zip(found[3:7], small, large, strict=True))
    if not fits or position != end or found[0] != 0x06054B50 or any((*found[1:3], found[7])) or not sizes_fit:
        raise zipfile.BadZipFile(f"the records at its end are not those of {count} entries at byte {start}")


def _local_header(file: BinaryIO, info: zipfile.ZipInfo) -> int | None:
    """Return the byte at which an entry's values begin, or None where its header is missing or another one's."""
    file.seek(info.header_offset)
    fields = file.read(LOCAL.size)
    if len(fields) < LOCAL.size:
        return None
    signature, _, flags, method, *_, name_length, extra_length = LOCAL.unpack(fields)
    name = info.orig_filename.encode()
    if (signature, flags, method) != (0x04034B50, info.flag_bits, info.compress_type):
        return None
    if file.read(name_length) != name:
        return None
    return info.header_offset + LOCAL.size + name_length + extra_length


def check_small_entries(path: Path) -> None:
    """Compare what an archive holds beside storages (the pickle, versions) with its CRCs.

    Raises:
        CheckpointError: An entry is not what was written.
    """
    for name, entry in read_directory(path)[1].items():
        if not name.startswith("data/") and zlib.crc32(read_bytes(path, entry.offset, entry.size)) != entry.crc:
            raise CheckpointError(f"{path} is damaged: the CRC-32 of its '{name}' is not what was written")
