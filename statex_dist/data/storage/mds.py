"""MDS shards, written by mosaicml-streaming and read by our own reader. The only file that imports ``streaming``.

A shard is random access from one memory map, so streaming's reader is not needed. It is not used either: when a shard
is missing or damaged, its iteration ends early without an exception (0.13.0), which would quietly train on less.

Layout of a raw shard of ``n`` samples (read from files and checked against streaming 0.13)::

    u32 n | u32 offset[n + 1] | JSON config | samples
    sample = u32 size of each variable-size column, in column order | the columns' bytes
    ndarray of fixed dtype, any shape = u8 (ndim << 2 | log2 of the dimensions' bytes) | dimensions | values
"""

from __future__ import annotations

import importlib.util
import logging
import os
import reprlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from statex_dist.bare_package import import_from_bare
from statex_dist.data.columns import SHARD_REMEDY, refused_in_shards
from statex_dist.data.columns import TOKENS as TOKEN_IDS
from statex_dist.data.storage.shards import (
    LOSS_MASK,
    TOKEN_DTYPES,
    TOKENS,
    FileEntry,
    MappedShard,
    ShardEntry,
    check_count,
    parse_index,
)
from statex_dist.errors import ConfigError, DataError

log = logging.getLogger(__name__)

_HASH = "xxh64"
# Offsets inside a shard are uint32 and streaming lets them wrap, so the bound is ours to keep.
_MAX_SHARD_BYTES = 1 << 31


def has_streaming() -> bool:
    """Return whether mosaicml-streaming is installed (the writer and cloud storage need it)."""
    return importlib.util.find_spec("streaming") is not None


def load_streaming() -> ModuleType:
    """Import and return ``streaming.base`` without running ``streaming/__init__``, which imports torchvision.

    Also set ``LOCAL_WORLD_SIZE`` for streaming where the deepspeed launcher does not (it sets ``LOCAL_SIZE``): without
    it every rank believes to be the local leader (streaming issue 717).

    Raises:
        ConfigError: mosaicml-streaming is not installed.
    """
    if "LOCAL_SIZE" in os.environ:
        os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ["LOCAL_SIZE"])
    if not has_streaming():
        raise ConfigError(
            "writing MDS and reading cloud storage need mosaicml-streaming: "
            "pip install --no-deps mosaicml-streaming==0.13.0"
        )
    return import_from_bare("streaming.base")


class MdsShardWriter:
    """Writes documents as MDS shards ``shard.00000.mds[.zstd]``, ... and ``index.json``.

    Args:
        directory: Existing empty directory.
        dtype: ``"uint16"`` or ``"uint32"``.
        loss_mask: Whether to write the ``loss_mask`` column.
        compression: ``"none"`` or ``"zstd"``.
        shard_bytes: Upper limit of a raw shard (one longer document still makes a shard of its own).

    Attributes:
        shard_documents: Documents of each shard; complete after :meth:`finish`.
    """

    def __init__(self, directory: Path, *, dtype: str, loss_mask: bool, compression: str, shard_bytes: int):
        if not 1 <= shard_bytes <= _MAX_SHARD_BYTES:
            raise ConfigError(f"shard size {shard_bytes} bytes is not in 1..{_MAX_SHARD_BYTES} (2 GiB)")
        columns = {TOKENS: f"ndarray:{dtype}"} | ({LOSS_MASK: "ndarray:uint8"} if loss_mask else {})
        self._dtype = np.dtype(dtype)
        self._mask = loss_mask
        self._documents = 0
        self.shard_documents: list[int] = []
        self._writer = load_streaming().MDSWriter(
            out=str(directory),
            columns=columns,
            compression=None if compression == "none" else compression,
            hashes=[_HASH],
            size_limit=shard_bytes,
        )

    def write(self, tokens: np.ndarray, loss_mask: np.ndarray | None = None) -> None:
        """Append a document ``[n]`` (``n >= 1``) and, if the column exists, its mask ``[n]`` (default: all ones).

        Raises:
            DataError: The document cannot fit a shard.
        """
        if tokens.nbytes * 2 > _MAX_SHARD_BYTES:
            raise DataError(f"a document of {len(tokens)} tokens does not fit an MDS shard; split it")
        sample = {TOKENS: tokens.astype(self._dtype, copy=False)}
        if self._mask:
            sample[LOSS_MASK] = np.ones(len(tokens), np.uint8) if loss_mask is None else loss_mask
        self._writer.write(sample)
        if len(self._writer.shards) > len(self.shard_documents):
            self.shard_documents.append(self._documents)
            self._documents = 0
        self._documents += 1

    def finish(self) -> None:
        """Write the last shard and the index."""
        self._writer.finish()
        self.shard_documents.append(self._documents)

    def abort(self) -> None:
        """End the writer's threads without writing more."""
        self._writer.cancel_future_jobs()


INDEX_NAME = "index.json"
_NUMBERS = (*TOKEN_DTYPES, "int8", "int16", "uint64", "float16", "float32", "float64")


class MdsShard(MappedShard):
    """One open raw shard: the memory map and, for each document, where its values begin and how many there are.

    Raises:
        DataError: The file is not what the entry says.
    """

    def __init__(self, path: Path, entry: ShardEntry):
        info = entry.details
        try:
            super().__init__(path, _column_dtype(info, TOKENS))
            self._locate(path, info)
        except (IndexError, ValueError) as error:
            raise DataError(
                f"{path} is not a readable MDS shard of tokens ({error}); prepare the dataset again"
            ) from error

    def _locate(self, path: Path, info: Mapping[str, Any]) -> None:
        samples = info["samples"]
        head = self._map[: 4 * (samples + 2)]
        count, *_ = head[:4].view("<u4").tolist()
        if count != samples:
            raise ValueError(f"{count} samples in it, {samples} in the index")
        offsets = head[4:].view("<u4").astype(np.int64)
        if len(offsets) != samples + 1 or offsets[-1] != len(self._map) or (np.diff(offsets) <= 0).any():
            raise ValueError("sample offsets are out of order")
        names, sizes = info["column_names"], info["column_sizes"]
        variable = [name for name, size in zip(names, sizes, strict=True) if not size]
        position = offsets[:-1] + 4 * len(variable)
        others: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        begin: dict[str, np.ndarray] = {}
        length: dict[str, np.ndarray] = {}
        for name, size in zip(names, sizes, strict=True):
            if not size:
                size = self._gather_u32(offsets[:-1] + 4 * variable.index(name))
            if name in (TOKENS, LOSS_MASK):
                begin[name], length[name] = self._array_at(position, size, np.dtype(_column_dtype(info, name)))
            elif _column_dtype(info, name) in _NUMBERS and isinstance(size, np.ndarray):
                others[name] = position, size
            position = position + size
        if (position != offsets[1:]).any():
            raise ValueError("column sizes do not add up to the samples")
        self._place(begin[TOKENS], length[TOKENS], begin.get(LOSS_MASK))
        if LOSS_MASK in length and (length[LOSS_MASK] != self.lengths).any():
            raise ValueError("a loss_mask is not as long as its tokens")
        for name, (at, size) in others.items():
            if self._is_per_token(at, size, np.dtype(_column_dtype(info, name))):
                raise DataError(f"{path}: column {name!r} has a number for each token; it {SHARD_REMEDY}")

    def _is_per_token(self, at: np.ndarray, size: np.ndarray, dtype: np.dtype) -> bool:
        try:
            counts = self._array_at(at, size, dtype)[1]
        except ValueError:
            return False
        return bool((counts == self.lengths).all() and (counts > 1).any())

    def _gather_u32(self, at: np.ndarray) -> np.ndarray:
        return (self._map[at[:, None] + np.arange(4)] * (1 << np.arange(0, 32, 8))).sum(1)

    def _array_at(self, position: np.ndarray, size: Any, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
        header = self._map[position].astype(np.int64)
        if (header >> 2 != 1).any():
            raise ValueError("an array is not one-dimensional")
        head = 1 + (1 << (header & 3))
        if ((size - head) % dtype.itemsize).any() or (size < head).any():
            raise ValueError("an array's size does not fit its type")
        return position + head, (size - head) // dtype.itemsize


def read_index(content: bytes, origin: str) -> list[ShardEntry]:
    """Return the shards that ``content``, an ``index.json``, describes.

    Raises:
        DataError: It is damaged, empty or describes something other than MDS shards of tokens.
    """
    entries = parse_index(content, origin, "MDS entry", _wrong_version, _entry)
    if unused := {name for entry in entries for name in entry.details["column_names"]} - {TOKENS, LOSS_MASK}:
        log.info("%s: columns that are not used: %s", origin, ", ".join(sorted(unused)))
    return entries


def _wrong_version(index: Mapping[str, Any]) -> str | None:
    version, shards = index["version"], index["shards"]
    return None if version == 2 and shards else f"MDS version {reprlib.repr(version)} with {len(shards)} shards"


def _entry(shard: Any) -> ShardEntry:
    _check_columns(shard)
    zipped = shard.get("zip_data")
    return ShardEntry(
        raw=_file(shard["raw_data"]),
        packed=None if zipped is None else _file(zipped),
        compression=shard.get("compression"),
        documents=shard["samples"],
        details=shard,
    )


def _file(entry: Mapping[str, Any]) -> FileEntry:
    hashes = entry.get("hashes")
    return FileEntry(entry["basename"], entry["bytes"], {} if hashes is None else hashes)


def _check_columns(shard: Mapping[str, Any]) -> None:
    if shard["format"] != "mds":
        raise DataError(f"its format is {reprlib.repr(shard['format'])}; allowed: mds")
    columns = {name: shard[name] for name in ("column_names", "column_encodings", "column_sizes")}
    for name, values in columns.items():
        if not isinstance(values, list) or len(values) != len(columns["column_names"]):
            raise DataError(f"{name} is {reprlib.repr(values)}; allowed: a list with one entry for each column")
        if name == "column_sizes":
            for size in values:
                if size is not None:
                    check_count("the size of a column", size)
        elif not all(isinstance(value, str) for value in values):
            raise DataError(f"{name} is {reprlib.repr(values)}; allowed: a list of text")
    names = columns["column_names"]
    if len(set(names)) != len(names):
        raise DataError(f"two columns have one name: {', '.join(names)}")
    if TOKENS not in names:
        raise DataError(f"no column {TOKENS!r} (there are: {', '.join(names)})")
    for name in names:
        if name == TOKEN_IDS or refused_in_shards(name):
            raise DataError(f"column {name!r} {SHARD_REMEDY}")
    for name, allowed in ((TOKENS, TOKEN_DTYPES), (LOSS_MASK, ("uint8",))):
        if name in names and _column_dtype(shard, name) not in allowed:
            raise DataError(
                f"column {name!r} must be one-dimensional ndarray of {', '.join(allowed)}, not "
                f"{columns['column_encodings'][names.index(name)]!r}"
            )


def _column_dtype(shard: Mapping[str, Any], name: str) -> str:
    encoding = shard["column_encodings"][shard["column_names"].index(name)]
    return encoding.removeprefix("ndarray:") if encoding.startswith("ndarray:") else ""
