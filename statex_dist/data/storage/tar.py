"""Tar shards in webdataset's format, written by webdataset. The only file that imports it.

It writes only: :mod:`statex_dist.data.storage.tar_format` reads, because webdataset reads from front to end, gives
ranks unequal numbers of samples and cannot resume.
"""

from __future__ import annotations

import gzip
import importlib
import importlib.util
import io
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np

from statex_dist.data.storage.shards import FileEntry, ShardEntry, hash_file
from statex_dist.data.storage.tar_format import DTYPE, HAS_LOSS_MASK, INDEX_NAME, MEMBERS_SUFFIX, pack_index
from statex_dist.data.storage.tar_members import LENGTHS_MEMBER, LOSS_MASK_MEMBER, TOKENS_MEMBERS
from statex_dist.errors import ConfigError

COMPRESSIONS = ("none", "gz", "zstd")

_HASH = "xxh64"
# A shard is compressed, and unpacked, in memory.
_MAX_SHARD_BYTES = 1 << 31
_CHUNK_DOCUMENTS = 256
_CHUNK_BYTES = 1 << 20
_BLOCK = 512
# Two empty blocks end a tar, which is then filled up to a whole record.
_RECORD = 20 * _BLOCK
_NPY_HEADER = 128


def has_webdataset() -> bool:
    """Return whether webdataset is installed (only the writer needs it)."""
    return importlib.util.find_spec("webdataset") is not None


def load_webdataset() -> ModuleType:
    """Import and return ``webdataset``.

    Raises:
        ConfigError: It is not installed.
    """
    if not has_webdataset():
        raise ConfigError("writing tar shards needs webdataset: pip install webdataset==1.0.2")
    return importlib.import_module("webdataset")


class WdsShardWriter:
    """Writes documents as tar shards ``shard-00000.tar[.gz|.zst]``, ... and ``shards.json``; equal input, equal bytes.

    Args:
        directory: Existing empty directory.
        dtype: ``"uint16"`` or ``"uint32"``.
        loss_mask: Whether to write the ``loss_mask.npy`` members.
        compression: ``"none"``, ``"gz"`` (which webdataset reads by itself) or ``"zstd"``.
        shard_bytes: Upper limit of a raw shard (one longer document still makes a shard of its own).

    Attributes:
        shard_documents: Documents of each shard; complete after :meth:`finish`.

    Raises:
        ConfigError: An argument is out of its range, or webdataset is not installed.
    """

    def __init__(self, directory: Path, *, dtype: str, loss_mask: bool, compression: str, shard_bytes: int):
        if not 1 <= shard_bytes <= _MAX_SHARD_BYTES:
            raise ConfigError(f"shard size {shard_bytes} bytes is not in 1..{_MAX_SHARD_BYTES} (2 GiB)")
        if compression not in COMPRESSIONS:
            raise ConfigError(f"compression of tar shards is {compression!r}; allowed: {', '.join(COMPRESSIONS)}")
        self.shard_documents: list[int] = []
        self._directory = directory
        self._dtype = np.dtype(dtype)
        self._mask = loss_mask
        self._compression = compression
        self._limit = shard_bytes
        self._tar_writer: Callable[..., Any] = load_webdataset().TarWriter
        self._entries: list[ShardEntry] = []
        self._num_chunks = 0
        self._chunk = _Chunk()
        self._shard: _OpenTar | None = None

    def write(self, tokens: np.ndarray, loss_mask: np.ndarray | None = None) -> None:
        """Append a document ``[n]`` and, if masks are written, its mask ``[n]`` (default: all ones)."""
        if (
            len(self._chunk.lengths) >= _CHUNK_DOCUMENTS
            or self._chunk.num_tokens * self._dtype.itemsize >= _CHUNK_BYTES
        ):
            self._flush()
        if (self._chunk.lengths or self._shard) and self._size_with(len(tokens)) > self._limit:
            self._close_shard()
        mask = None
        if self._mask:
            mask = np.ones(len(tokens), np.uint8) if loss_mask is None else np.array(loss_mask, np.uint8)
        # Copies: the caller may use its buffers again before the chunk is written.
        self._chunk.append(np.array(tokens, self._dtype), mask)

    def finish(self) -> None:
        """Write the last shard and the index."""
        self._close_shard()
        (self._directory / INDEX_NAME).write_bytes(pack_index(self._entries))

    def abort(self) -> None:
        """Close the open file without writing more."""
        if self._shard is not None:
            self._shard.file.close()
            self._shard = None

    def _size_with(self, more: int) -> int:
        """Bytes of the raw shard if a document of ``more`` tokens joined the chunk and were the last."""
        documents, tokens = len(self._chunk.lengths) + 1, self._chunk.num_tokens + more
        arrays = [documents * 4, tokens * self._dtype.itemsize] + [tokens] * self._mask
        sample = sum(_BLOCK + _round_up(_NPY_HEADER + size, _BLOCK) for size in arrays)
        return _round_up((self._shard.size if self._shard else 0) + sample + 2 * _BLOCK, _RECORD)

    def _flush(self) -> None:
        """Write the chunk as one sample."""
        chunk = self._chunk
        if not chunk.lengths:
            return
        if self._shard is None:
            path = self._directory / f"shard-{len(self._entries):05d}.tar"
            file = path.open("wb")
            self._shard = _OpenTar(path, file, self._tar_writer(file, mtime=0, encoder=False))
        lengths = np.array(chunk.lengths, np.uint32)
        arrays = {LENGTHS_MEMBER: lengths, TOKENS_MEMBERS[0]: np.concatenate(chunk.tokens)}
        if self._mask:
            arrays[LOSS_MASK_MEMBER] = np.concatenate(chunk.masks)
        begin = self._shard.write(f"{self._num_chunks:08d}", arrays)
        first = np.cumsum(lengths, dtype=np.int64) - lengths
        tokens_at = begin[TOKENS_MEMBERS[0]] + first * self._dtype.itemsize
        masks_at = begin[LOSS_MASK_MEMBER] + first if self._mask else np.full(len(lengths), -1)
        self._shard.rows.append(np.stack([tokens_at, lengths, masks_at], 1).astype(np.int64))
        self._num_chunks += 1
        self._chunk = _Chunk()

    def _close_shard(self) -> None:
        self._flush()
        if self._shard is None:
            return
        shard, self._shard = self._shard, None
        shard.tar.close()
        shard.file.close()
        rows = np.concatenate(shard.rows)
        members = shard.path.with_name(shard.path.name + MEMBERS_SUFFIX)
        np.save(members, rows)
        raw = _entry(shard.path)
        packed = None
        if self._compression != "none":
            packed = _entry(_compress(shard.path, self._compression))
            shard.path.unlink()
        self.shard_documents.append(len(rows))
        self._entries.append(
            ShardEntry(
                raw=raw,
                packed=packed,
                compression=None if packed is None else self._compression,
                companion=_entry(members),
                documents=len(rows),
                details={DTYPE: self._dtype.name, HAS_LOSS_MASK: self._mask},
            )
        )


class _Chunk:
    """Documents that become one sample."""

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self.tokens: list[np.ndarray] = []
        self.masks: list[np.ndarray] = []
        self.num_tokens = 0

    def append(self, tokens: np.ndarray, mask: np.ndarray | None) -> None:
        """Add a document."""
        self.lengths.append(len(tokens))
        self.tokens.append(tokens)
        self.num_tokens += len(tokens)
        if mask is not None:
            assert len(mask) == len(tokens)
            self.masks.append(mask)


class _OpenTar:
    """A tar that is being written, and where its arrays are."""

    def __init__(self, path: Path, file: BinaryIO, tar: Any):
        self.path = path
        self.file = file
        self.tar = tar
        self.size = 0
        self.rows: list[np.ndarray] = []

    def write(self, key: str, arrays: dict[str, np.ndarray]) -> dict[str, int]:
        """Append a sample; return the byte at which each array's values begin."""
        members = {name: _npy(array) for name, array in arrays.items()}
        begin = {}
        for name in sorted(members):  # webdataset's order
            end_of_header = len(members[name]) - arrays[name].nbytes
            begin[name] = self.size + _BLOCK + end_of_header
            self.size += _BLOCK + _round_up(len(members[name]), _BLOCK)
        self.tar.write({"__key__": key, **members})
        return begin


def _npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array(out, array, version=(1, 0), allow_pickle=False)
    return out.getvalue()


def _compress(path: Path, compression: str) -> Path:
    content = path.read_bytes()
    if compression == "gz":
        packed = path.with_name(path.name + ".gz")
        packed.write_bytes(gzip.compress(content, mtime=0))
        return packed
    import zstd

    packed = path.with_name(path.name + ".zst")
    packed.write_bytes(zstd.compress(content, 3, 1))  # one thread: the bytes depend on their number
    return packed


def _entry(path: Path) -> FileEntry:
    return FileEntry(path.name, path.stat().st_size, {_HASH: hash_file(path, _HASH)})


def _round_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit
