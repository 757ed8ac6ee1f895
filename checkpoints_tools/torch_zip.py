"""``torch.save`` files: zip archives of one pickle and the raw bytes of the storages, all uncompressed.

Read without torch, and laid out so that the storages can be written later, by anyone, in any order: the headers and the
pickle are known beforehand, the CRCs are filled in at the end.
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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from checkpoints_tools.raw_io import FileState, read_bytes
from checkpoints_tools.torch_pickle_writer import dumps
from statex_dist.checkpoint.archive import DAMAGE
from statex_dist.checkpoint.dtypes import ITEM_BYTES
from statex_dist.checkpoint.torch_pickle import MAX_PICKLE_BYTES, UnsafePickleError, loads
from statex_dist.errors import CheckpointError, one_line

_ALIGNMENT = 64
_LOCAL = struct.Struct("<IHHHHHIIIHH")
_CENTRAL = struct.Struct("<IHHHHHHIIIHHHHHII")
_END = struct.Struct("<IHHHHIIH")
_LOCATOR = struct.Struct("<IIQI")
_MAX_DIRECTORY_BYTES = 32 << 20
_UTF8 = 0x0800
_KNOWN_FLAGS = _UTF8 | 0x0008  # names in UTF-8; sizes and CRC stand behind the values too

_ZIP64 = 0xFFFFFFFF


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
        root: Name of the archive's folder: torch takes the file's own name when it saves, so that a file which was
            renamed later still says what it was.
        entries: By name below the root (``data.pkl``, ``data/0``, ...).
        state: What the file was when it was opened.
        content: What was saved, with tensors as references.
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
    """What is wrong with an archive: a verdict that fits behind its name (``is damaged``), and why."""

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
    """Open a file, and say of what is wrong with it that it is this file's."""
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
        raise CheckpointError(f"{path} is truncated or not a torch.save file: {one_line(error)}") from None


def read_entries(file: BinaryIO, size: int) -> tuple[str, dict[str, Entry]]:
    """Return the root folder and the entries of an archive, after checking that they lie in it without overlap.

    Args:
        file: The archive, or a slice of a larger file.
        size: Its bytes.

    Raises:
        ArchiveError: It is not as torch writes it. (Or any of
            :data:`statex_dist.checkpoint.archive.DAMAGE`: it is not an archive.)
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
    if len(tail) < _END.size or not tail.startswith(b"PK\5\6", len(tail) - _END.size):
        raise zipfile.BadZipFile("it does not end with the directory of an archive")
    length = _END.unpack_from(tail, len(tail) - _END.size)[5]
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
    directory, end = position, len(tail) - _END.size
    fits = position <= end
    if fits and tail.startswith(b"PK\6\6", position):
        *disks, here, total, length, offset = struct.unpack_from("<IIQQQQ", tail, position + 16)
        lengths = struct.unpack_from("<Q", tail, position + 4)
        locator = _LOCATOR.unpack_from(tail, position + 56)
        fits = (here, total, length, offset, *disks, *lengths) == (count, count, directory, start, 0, 0, 44)
        fits = fits and locator == (0x07064B50, 0, start + position, 1)
        position += 76
    found = _END.unpack_from(tail, end)
    small = (min(count, 0xFFFF), min(count, 0xFFFF), min(directory, _ZIP64), min(start, _ZIP64))
    # The short record may point to the long one even where its own fields would do.
    large = (0xFFFF, 0xFFFF, _ZIP64, _ZIP64)
    sizes_fit = all(value in pair for value, *pair in zip(found[3:7], small, large, strict=True))
    if not fits or position != end or found[0] != 0x06054B50 or any((*found[1:3], found[7])) or not sizes_fit:
        raise zipfile.BadZipFile(f"the records at its end are not those of {count} entries at byte {start}")


def _local_header(file: BinaryIO, info: zipfile.ZipInfo) -> int | None:
    """Return the byte at which an entry's values begin, or None where its header is missing or another one's."""
    file.seek(info.header_offset)
    fields = file.read(_LOCAL.size)
    if len(fields) < _LOCAL.size:
        return None
    signature, _, flags, method, *_, name_length, extra_length = _LOCAL.unpack(fields)
    name = info.orig_filename.encode()
    if (signature, flags, method) != (0x04034B50, info.flag_bits, info.compress_type):
        return None
    if file.read(name_length) != name:
        return None
    return info.header_offset + _LOCAL.size + name_length + extra_length


def check_small_entries(path: Path) -> None:
    """Compare what an archive holds beside storages (the pickle, versions) with its CRCs.

    Raises:
        CheckpointError: An entry is not what was written.
    """
    for name, entry in read_directory(path)[1].items():
        if not name.startswith("data/") and zlib.crc32(read_bytes(path, entry.offset, entry.size)) != entry.crc:
            raise CheckpointError(f"{path} is damaged: the CRC-32 of its '{name}' is not what was written")


@dataclass(frozen=True, kw_only=True, slots=True)
class ArchiveLayout:
    """A ``torch.save`` file (or a part of a larger file) that is to be written.

    Attributes:
        root: Name of its folder.
        size: Bytes in all.
        storages: Byte offset and size of each storage whose bytes are to be written, by key.
        fixed: ``(offset, bytes)`` of everything that is known beforehand.
    """

    root: str
    size: int
    storages: Mapping[str, tuple[int, int]]
    fixed: tuple[tuple[int, bytes], ...]
    _members: tuple[tuple[str, int, int, int, int | None], ...]  # name, header offset, offset, size, CRC if known
    _directory: int

    @classmethod
    def build(cls, root: str, content: Any, storages: Mapping[str, int | bytes]) -> ArchiveLayout:
        """Lay a file out.

        Args:
            root: Name of the folder: the file's name without its ending, as torch has it.
            content: What is saved; its tensors refer to ``storages``.
            storages: By key the number of bytes of each storage, or the bytes where they are known.
        """
        known = {
            "data.pkl": dumps(content),
            ".format_version": b"1",
            ".storage_alignment": b"64",
            "byteorder": b"little",
        }
        tail = {"version": b"3\n"}
        names: list[tuple[str, bytes | int]] = [*known.items()]
        names += [(f"data/{key}", size) for key, size in storages.items()]
        names += [*tail.items()]
        members, fixed, places, position = [], [], {}, 0
        for name, data in names:
            size = data if isinstance(data, int) else len(data)
            header, crc = position, None if isinstance(data, int) else zlib.crc32(data)
            full = f"{root}/{name}".encode()
            large = _large(size)
            begin = header + _LOCAL.size + len(full) + (20 if large else 0) + 4
            padding = -begin % _ALIGNMENT
            offset = begin + padding
            extra = struct.pack("<HHQQ", 1, 16, size, size) if large else b""
            # "FB" with a length is how torch fills up to the alignment.
            extra += b"FB" + struct.pack("<H", padding) + b"Z" * padding
            shown = _ZIP64 if large else size
            fixed.append(
                (
                    header,
                    _LOCAL.pack(
                        *(0x04034B50, 45 if large else 20, _UTF8, 0, 0, 0x21, crc or 0),
                        *(shown, shown, len(full), len(extra)),
                    )
                    + full
                    + extra,
                )
            )
            if isinstance(data, int):
                places[name.removeprefix("data/")] = (offset, size)
            else:
                fixed.append((offset, data))
            members.append((name, header, offset, size, crc))
            position = offset + size
        layout = cls(
            root=root, size=0, storages=places, fixed=tuple(fixed), _members=tuple(members), _directory=position
        )
        return replace(layout, size=position + len(layout._central({})))

    def closing(self, crcs: Mapping[str, int]) -> list[tuple[int, bytes]]:
        """Return the ``(offset, bytes)`` that complete the file once the storages are written.

        Args:
            crcs: CRC-32 of each storage, by key.
        """
        patches = []
        for name, header, _, _, crc in self._members:
            if crc is None:
                patches.append((header + 14, struct.pack("<I", crcs[name.removeprefix("data/")])))
        return [*patches, (self._directory, self._central(crcs))]

    def _central(self, crcs: Mapping[str, int]) -> bytes:
        entries = bytearray()
        for name, header, _, size, known in self._members:
            crc = known if known is not None else crcs.get(name.removeprefix("data/"), 0)
            large, far = _large(size), header >= _ZIP64
            wide = (struct.pack("<QQ", size, size) if large else b"") + (struct.pack("<Q", header) if far else b"")
            extra = struct.pack("<HH", 1, len(wide)) + wide if wide else b""
            full = f"{self.root}/{name}".encode()
            shown, version = _ZIP64 if large else size, 45 if wide else 20
            entries += _CENTRAL.pack(
                *(0x02014B50, version, version, _UTF8, 0, 0, 0x21, crc, shown, shown, len(full), len(extra)),
                *(0, 0, 0, 0, _ZIP64 if far else header),
            )
            entries += full + extra
        count, start, length = len(self._members), self._directory, len(entries)
        if start + length >= _ZIP64 or count >= 0xFFFF:
            entries += struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 45, 45, 0, 0, count, count, length, start)
            entries += _LOCATOR.pack(0x07064B50, 0, start + length, 1)
        entries += _END.pack(0x06054B50, 0, 0, min(count, 0xFFFF), min(count, 0xFFFF), length, min(start, _ZIP64), 0)
        return bytes(entries)


def _large(size: int) -> bool:
    return size >= _ZIP64


def archive_bytes(root: str, content: Any, storages: Mapping[str, bytes] | None = None) -> bytes:
    """Return a whole (small) ``torch.save`` file; arguments of :meth:`ArchiveLayout.build`."""
    layout = ArchiveLayout.build(root, content, storages or {})
    data = bytearray(layout.size)
    for offset, part in (*layout.fixed, *layout.closing({})):
        data[offset : offset + len(part)] = part
    return bytes(data)
