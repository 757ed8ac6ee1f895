"""The MDS format, read: the index, a shard's file and the documents in it. Needs numpy and xxhash, not ``streaming``.

Layout of a raw shard of ``n`` samples (read from files and checked against streaming 0.13)::

    u32 n | u32 offset[n + 1] | JSON config | samples
    sample = u32 size of each variable-size column, in column order | the columns' bytes
    ndarray of fixed dtype, any shape = u8 (ndim << 2 | log2 of the dimensions' bytes) | dimensions | values
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from statex_dist.data.store import Piece
from statex_dist.errors import DataError

TOKENS = "tokens"
LOSS_MASK = "loss_mask"
_TOKEN_DTYPES = ("uint8", "uint16", "uint32", "int32", "int64")


class MdsShard:
    """One open raw shard: the memory map and, for each document, where its values begin and how many there are.

    Args:
        path: The raw shard.
        info: Its entry in the index.

    Attributes:
        lengths: ``[documents]`` int64, tokens of each document.

    Raises:
        DataError: The file is not what the entry says.
    """

    def __init__(self, path: Path, info: dict[str, Any]):
        self._dtype = np.dtype(_column_dtype(info, TOKENS))
        try:
            self._map = np.memmap(path, np.uint8, mode="r")
            self._locate(info)
        except (IndexError, ValueError) as error:
            raise DataError(
                f"{path} is not a readable MDS shard of tokens ({error}); prepare the dataset again"
            ) from error

    def _locate(self, info: dict[str, Any]) -> None:
        samples = int(info["samples"])
        head = self._map[: 4 * (samples + 2)]
        count, *_ = head[:4].view("<u4").tolist()
        if count != samples:
            raise ValueError(f"{count} samples in it, {samples} in the index")
        offsets = head[4:].view("<u4").astype(np.int64)
        if offsets[-1] != len(self._map) or (np.diff(offsets) <= 0).any():
            raise ValueError("sample offsets are out of order")
        names, sizes = info["column_names"], info["column_sizes"]
        variable = [name for name, size in zip(names, sizes, strict=True) if not size]
        position = offsets[:-1] + 4 * len(variable)
        begin: dict[str, np.ndarray] = {}
        length: dict[str, np.ndarray] = {}
        for name, size in zip(names, sizes, strict=True):
            if not size:
                size = self._gather_u32(offsets[:-1] + 4 * variable.index(name))
            if name in (TOKENS, LOSS_MASK):
                begin[name], length[name] = self._array_at(position, size, np.dtype(_column_dtype(info, name)))
            position = position + size
        if (position != offsets[1:]).any():
            raise ValueError("column sizes do not add up to the samples")
        self._begin = begin[TOKENS]
        self.lengths = length[TOKENS]
        self._mask_begin = begin.get(LOSS_MASK)
        if LOSS_MASK in length and (length[LOSS_MASK] != self.lengths).any():
            raise ValueError("a loss_mask is not as long as its tokens")

    def _gather_u32(self, at: np.ndarray) -> np.ndarray:
        return (self._map[at[:, None] + np.arange(4)] * (1 << np.arange(0, 32, 8))).sum(1)

    def _array_at(self, position: np.ndarray, size: Any, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
        header = self._map[position].astype(np.int64)
        if (header >> 2 != 1).any():
            raise ValueError("an array is not one-dimensional")
        head = 1 + (1 << (header & 3))
        if ((size - head) % dtype.itemsize).any() or (size <= head).any():
            raise ValueError("an array's size does not fit its type")
        return position + head, (size - head) // dtype.itemsize

    def read(self, i: int, start: int, stop: int) -> Piece:
        """Return tokens ``start..stop`` of document ``i``, as views of the map."""
        if not 0 <= start < stop <= self.lengths[i]:
            raise IndexError(f"tokens {start}..{stop} of a document of {self.lengths[i]}")
        n = stop - start
        at = int(self._begin[i]) + start * self._dtype.itemsize
        tokens = np.frombuffer(self._map, self._dtype, n, at)
        if self._mask_begin is None:
            return Piece(tokens)
        return Piece(tokens, np.frombuffer(self._map, np.uint8, n, int(self._mask_begin[i]) + start))


def verify_file(path: Path, info: dict[str, Any]) -> None:
    """Check a shard file against its entry in the index.

    Raises:
        DataError: Its size or one of its hashes differs.
    """
    size = path.stat().st_size
    if size != info["bytes"]:
        raise DataError(
            f"{path} has {size} bytes, the index says {info['bytes']}; restore it or prepare the data again"
        )
    for name, expected in info.get("hashes", {}).items():
        digest = getattr(xxhash, name)() if name in xxhash.algorithms_available else hashlib.new(name)
        digest.update(np.memmap(path, np.uint8, mode="r").data)
        if digest.hexdigest() != expected:
            raise DataError(f"{path} is damaged ({name} differs from the index); restore it or prepare the data again")


def decompress(compression: str, content: bytes) -> bytes:
    """Return the raw shard of a compressed one; ``compression`` is the index's word, such as ``"zstd:3"``."""
    codec = compression.partition(":")[0]
    if codec == "zstd":
        import zstd

        return zstd.decompress(content)
    if codec in ("gz", "bz2"):
        return gzip.decompress(content) if codec == "gz" else bz2.decompress(content)
    raise DataError(f"compression {compression!r} is not read here; allowed: none, zstd, gz, bz2")


def read_index(directory: Path) -> list[dict[str, Any]]:
    """Return the entries of ``index.json``, one for each shard.

    Raises:
        DataError: It is damaged, empty or describes something other than MDS shards of tokens.
    """
    path = directory / "index.json"
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        shards = index["shards"]
        if index["version"] != 2 or not shards:
            raise DataError(f"{path}: MDS version {index['version']} with {len(shards)} shards; prepare the data again")
        for shard in shards:
            _check_entry(path, shard)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not a readable MDS index ({error!r}); prepare the dataset again") from error
    return shards


def _check_entry(path: Path, shard: dict[str, Any]) -> None:
    if shard["format"] != "mds":
        raise DataError(f"{path}: shards of format {shard['format']!r}; allowed: mds")
    for file in (shard["raw_data"], shard.get("zip_data")):
        if file is not None and Path(file["basename"]).name != file["basename"]:
            raise DataError(f"{path}: {file['basename']!r} is not a plain file name")
    if TOKENS not in shard["column_names"]:
        raise DataError(
            f"{path}: no column {TOKENS!r} (there are: {', '.join(shard['column_names'])}); prepare the text"
        )
    for name, allowed in ((TOKENS, _TOKEN_DTYPES), (LOSS_MASK, ("uint8",))):
        if name in shard["column_names"] and _column_dtype(shard, name) not in allowed:
            raise DataError(
                f"{path}: column {name!r} must be one-dimensional ndarray of {', '.join(allowed)}, not "
                f"{shard['column_encodings'][shard['column_names'].index(name)]!r}"
            )


def _column_dtype(shard: dict[str, Any], name: str) -> str:
    encoding = shard["column_encodings"][shard["column_names"].index(name)]
    return encoding.removeprefix("ndarray:") if encoding.startswith("ndarray:") else ""


def fingerprint(shards: list[dict[str, Any]]) -> str:
    """Return a digest of the raw shards' sizes and hashes: equal for equal files."""
    files = [
        (s["samples"], s["raw_data"]["bytes"], s["raw_data"].get("hashes", {}), s["column_encodings"]) for s in shards
    ]
    return blake2b(json.dumps(files, sort_keys=True).encode(), digest_size=16).hexdigest()
