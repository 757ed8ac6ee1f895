"""Laying ``torch.save`` files out without torch, so that their storages can be written later, in any order.

The headers and the pickle are known beforehand; the CRCs are filled in at the end. The pickles hold what
``statex_dist.checkpoint.formats.torch_archive.pickle`` reads.
"""

from __future__ import annotations

import struct
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from statex_dist.checkpoint.formats.torch_archive.pickle import (
    MAX_DEPTH,
    MAX_PICKLE_BYTES,
    STORAGES,
    Ordered,
    Remembered,
    Size,
    StorageRef,
    TensorRef,
    UnsafePickleError,
    named,
)
from statex_dist.checkpoint.formats.torch_archive.zip import END, LOCAL, LOCATOR, UTF8, ZIP64

_ALIGNMENT = 64
_STORAGE_OF = {dtype: name for name, dtype in STORAGES.items()}
_CENTRAL = struct.Struct("<IHHHHHHIIIHHHHHII")


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
    def build(cls, root: str, pickled: bytes, storages: Mapping[str, int | bytes]) -> ArchiveLayout:
        """Lay a file out.

        Args:
            root: Name of the folder: the file's name without its ending, as torch has it.
            pickled: The pickle of the saved object (:func:`dumps`); its tensors refer to ``storages``.
            storages: By key the number of bytes of each storage, or the bytes where they are known.
        """
        known = {
            "data.pkl": pickled,
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
            begin = header + LOCAL.size + len(full) + (20 if large else 0) + 4
            padding = -begin % _ALIGNMENT
            offset = begin + padding
            extra = struct.pack("<HHQQ", 1, 16, size, size) if large else b""
            # "FB" with a length is how torch fills up to the alignment.
            extra += b"FB" + struct.pack("<H", padding) + b"Z" * padding
            shown = ZIP64 if large else size
            fixed.append(
                (
                    header,
                    LOCAL.pack(
                        *(0x04034B50, 45 if large else 20, UTF8, 0, 0, 0x21, crc or 0),
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
            large, far = _large(size), header >= ZIP64
            wide = (struct.pack("<QQ", size, size) if large else b"") + (struct.pack("<Q", header) if far else b"")
            extra = struct.pack("<HH", 1, len(wide)) + wide if wide else b""
            full = f"{self.root}/{name}".encode()
            shown, version = ZIP64 if large else size, 45 if wide else 20
            entries += _CENTRAL.pack(
                *(0x02014B50, version, version, UTF8, 0, 0, 0x21, crc, shown, shown, len(full), len(extra)),
                *(0, 0, 0, 0, ZIP64 if far else header),
            )
            entries += full + extra
        count, start, length = len(self._members), self._directory, len(entries)
        if start + length >= ZIP64 or count >= 0xFFFF:
            entries += struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 45, 45, 0, 0, count, count, length, start)
            entries += LOCATOR.pack(0x07064B50, 0, start + length, 1)
        entries += END.pack(0x06054B50, 0, 0, min(count, 0xFFFF), min(count, 0xFFFF), length, min(start, ZIP64), 0)
        return bytes(entries)


def _large(size: int) -> bool:
    return size >= ZIP64


def archive_bytes(root: str, content: Any, storages: Mapping[str, bytes] | None = None) -> bytes:
    """Return a whole (small) ``torch.save`` file of ``content``; arguments of :meth:`ArchiveLayout.build`."""
    layout = ArchiveLayout.build(root, dumps(content), storages or {})
    data = bytearray(layout.size)
    for offset, part in (*layout.fixed, *layout.closing({})):
        data[offset : offset + len(part)] = part
    return bytes(data)


def dumps(value: Any) -> bytes:
    """Return a pickle (protocol 2, as torch writes) of what ``loads`` of the reading half gives.

    Raises:
        UnsafePickleError: A value that torch files do not hold, or nesting without end.
    """
    out = bytearray(b"\x80\x02")
    _write(out, value, 0)
    out += b"."
    return bytes(out)


def _write(out: bytearray, value: Any, depth: int) -> None:
    if depth > MAX_DEPTH or len(out) > MAX_PICKLE_BYTES:
        raise UnsafePickleError("values nested without end")
    depth += 1
    kind = type(value)
    if value is None:
        out += b"N"
    elif kind is bool:
        out += b"\x88" if value else b"\x89"
    elif kind is int:
        _write_int(out, value)
    elif kind is float:
        out += b"G" + struct.pack(">d", value)
    elif kind is str:
        text = value.encode("utf-8", "surrogatepass")
        out += b"X" + struct.pack("<I", len(text)) + text
    elif kind in (bytes, bytearray):
        _write_call(out, "_codecs.encode", (bytes(value).decode("latin1"), "latin1"), depth)
    elif kind is tuple:
        out += b"("
        for item in value:
            _write(out, item, depth)
        out += b"t"
    elif kind is list:
        out += b"]("
        for item in value:
            _write(out, item, depth)
        out += b"e"
    elif kind in (dict, OrderedDict, Ordered):
        if kind is dict:
            out += b"}"
        else:
            _write_call(out, "collections.OrderedDict", (), depth)
        out += b"("
        for key, item in value.items():
            _write(out, key, depth)
            _write(out, item, depth)
        out += b"u"
    elif kind in (set, frozenset):
        _write_call(out, f"__builtin__.{kind.__name__}", (list(value),), depth)
    elif kind is Size:
        _write_call(out, "torch.Size", (tuple(value),), depth)
    elif kind is TensorRef:
        args = (value.storage, value.offset, value.shape, value.stride, False, OrderedDict[str, Any]())
        _write_call(out, "torch._utils._rebuild_tensor_v2", args, depth)
    elif kind is StorageRef:
        if value.dtype not in _STORAGE_OF:
            raise UnsafePickleError(f"tensors of dtype {value.dtype} cannot be written to a torch file")
        storage = named(f"torch.{_STORAGE_OF[value.dtype]}")
        _write(out, ("storage", storage, value.key, value.location, value.numel), depth)
        out += b"Q"
    elif isinstance(value, type) and issubclass(value, Remembered):
        _write_name(out, value.NAME)
    elif isinstance(value, Remembered):
        _write_name(out, value.NAME)
        _write(out, value.args, depth)
        out += b"R" if value.by_call else b"\x81"
        if value.state is not None:
            _write(out, value.state, depth)
            out += b"b"
    else:
        raise UnsafePickleError(f"a value of type {kind.__name__}")


def _write_int(out: bytearray, value: int) -> None:
    if 0 <= value < 256:
        out += b"K" + bytes([value])
    elif -(2**31) <= value < 2**31:
        out += b"J" + struct.pack("<i", value)
    else:
        data = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
        out += (b"\x8a" + bytes([len(data)]) if len(data) < 256 else b"\x8b" + struct.pack("<i", len(data))) + data


def _write_name(out: bytearray, name: str) -> None:
    module, _, attribute = name.rpartition(".")
    out += b"c" + module.encode() + b"\n" + attribute.encode() + b"\n"


def _write_call(out: bytearray, name: str, args: tuple[Any, ...], depth: int) -> None:
    _write_name(out, name)
    _write(out, args, depth)
    out += b"R"
