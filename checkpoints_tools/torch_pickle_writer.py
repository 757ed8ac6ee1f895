"""Write the pickles of ``torch.save`` files, without torch, from what ``statex_dist.checkpoint.torch_pickle`` reads."""

from __future__ import annotations

import struct
from collections import OrderedDict
from typing import Any

from statex_dist.checkpoint.torch_pickle import (
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

_STORAGE_OF = {dtype: name for name, dtype in STORAGES.items()}


def dumps(value: Any) -> bytes:
    """Return a pickle (protocol 2, as torch writes) of what :func:`statex_dist.checkpoint.torch_pickle.loads` gives.

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
