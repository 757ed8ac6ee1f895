"""A shard's facts before it is opened, and the interface of an open shard, for every format."""

from __future__ import annotations

import hashlib
import os
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from statex_dist.checkpoint.json_file import parse_json
from statex_dist.data.store import DocumentSlice
from statex_dist.errors import CorruptShardError, DataError, ShardError, reason

TOKENS = "tokens"
LOSS_MASK = "loss_mask"
TOKEN_DTYPES = ("uint8", "uint16", "uint32", "int32", "int64")

_MAX_NAME = 255
_MAX_COUNT = 1 << 60


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file of a shard as the index describes it.

    Attributes:
        name: Plain file name, beside the index.
        size: Its bytes.
        hashes: Hex digests by algorithm (``hashlib``'s or ``xxhash``'s names); may be empty.

    Raises:
        DataError: A value is of another type or not allowed.
    """

    name: str
    size: int
    hashes: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not _is_plain_name(self.name):
            raise DataError(
                f"{reprlib.repr(self.name)} is not a plain file name (text without '/', of 1 to {_MAX_NAME} bytes)"
            )
        check_count(f"size of {self.name}", self.size)
        if not isinstance(self.hashes, Mapping):
            raise DataError(f"hashes of {self.name} are {reprlib.repr(self.hashes)}; allowed: digests by algorithm")
        for algorithm, digest in self.hashes.items():
            if not isinstance(digest, str):
                raise DataError(f"{algorithm} of {self.name} is {reprlib.repr(digest)}; allowed: hex digits as text")
            if not _is_known_hash(algorithm):
                raise DataError(
                    f"hash {reprlib.repr(algorithm)} of {self.name} is not known; allowed: those of fixed length in "
                    "Python's hashlib, and xxhash's"
                )

    def verify(self, path: Path) -> None:
        """Check the file at ``path``.

        Raises:
            CorruptShardError: It is missing, or its size or one of its hashes differs.
            ShardError: It cannot be read.
        """
        try:
            size = path.stat().st_size
            if size != self.size:
                raise CorruptShardError(
                    f"{path} has {size} bytes, the index says {self.size}; restore it or prepare the data again"
                )
            for name, expected in self.hashes.items():
                if hash_file(path, name) != expected:
                    raise CorruptShardError(
                        f"{path} is damaged ({name} differs from the index); restore it or prepare the data again"
                    )
        except OSError as error:
            kind = CorruptShardError if isinstance(error, FileNotFoundError) else ShardError
            raise kind(f"{path} cannot be read: {error.strerror}; restore it or prepare the data again") from error


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardEntry:
    """A shard as the index describes it.

    Attributes:
        raw: The file that is read.
        packed: Its compressed form, where the dataset has one.
        compression: How ``packed`` is compressed: ``"zstd"``, ``"zstd:3"``, ``"gz"``, ``"bz2"``.
        companion: A small file that is needed to read the shard (the member index of a tar), or ``None``.
        documents: Number of documents.
        details: What else the format's reader needs.

    Raises:
        DataError: A value is of another type or not allowed.
    """

    raw: FileEntry
    packed: FileEntry | None = None
    compression: str | None = None
    companion: FileEntry | None = None
    documents: int
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_count(f"number of documents of {self.raw.name}", self.documents)
        if self.compression is not None and not isinstance(self.compression, str):
            raise DataError(f"compression of {self.raw.name} is {reprlib.repr(self.compression)}; allowed: a name")
        names = [file.name for file in (self.raw, self.packed, self.companion) if file is not None]
        if len(set(names)) != len(names):
            raise DataError(f"files of one shard have one name: {', '.join(names)}")


class MappedShard:
    """A raw shard, mapped for random access: a format gives the place where each document's values begin.

    Attributes:
        lengths: ``[documents]`` int64, tokens of each document.

    Raises:
        OSError: It cannot be mapped.
        ValueError: It is empty.
    """

    lengths: np.ndarray

    def __init__(self, path: Path, dtype: str):
        self._dtype = np.dtype(dtype)
        self._map = np.memmap(path, np.uint8, mode="r")

    def _place(self, begin: np.ndarray, lengths: np.ndarray, mask_begin: np.ndarray | None) -> None:
        """Set, ``[documents]`` each: first byte of the tokens, their number, first byte of the mask or -1 for none."""
        self._begin, self.lengths = begin, lengths
        self._mask_begin = np.full(len(lengths), -1) if mask_begin is None else mask_begin

    def read(self, i: int, start: int, stop: int) -> DocumentSlice:
        """Return tokens ``start..stop`` of document ``i``, as views of the map."""
        if not 0 <= start <= stop <= self.lengths[i]:
            raise IndexError(f"tokens {start}..{stop} of a document of {self.lengths[i]}")
        n, mask_begin = stop - start, int(self._mask_begin[i])
        tokens = np.frombuffer(self._map, self._dtype, n, int(self._begin[i]) + start * self._dtype.itemsize)
        return DocumentSlice(
            tokens, np.frombuffer(self._map, np.uint8, n, mask_begin + start) if mask_begin >= 0 else None
        )


def parse_index(
    content: bytes, origin: str, kind: str, check: Callable[[Any], str | None], parse: Callable[[Any], ShardEntry]
) -> list[ShardEntry]:
    """Return the shards that an index describes.

    Args:
        content: Its bytes.
        origin: Its path or URL, for messages.
        kind: What messages call an entry, such as ``"MDS entry"``.
        check: Returns what is wrong with the index as a whole.
        parse: Returns the entry of one shard; may raise KeyError, TypeError and AttributeError for a damaged entry.

    Raises:
        DataError: It is damaged, empty or of another version.
    """
    try:
        index = parse_json(content)
        shards = index["shards"]
        if not isinstance(shards, list):
            raise TypeError(f"its shards are {reprlib.repr(shards)}, not a list")
        wrong = check(index)
    except (ValueError, KeyError, TypeError) as error:
        what = f"{kind.split()[0]} index"
        raise DataError(f"{origin} is not a readable {what} ({reason(error)}); prepare the data again") from error
    if wrong:
        raise DataError(f"{origin}: {wrong}; prepare the data again")
    entries = []
    for number, shard in enumerate(shards):
        where = f"{origin}: shard {number}"
        try:
            entries.append(parse(shard))
        except DataError as error:
            raise DataError(f"{where}: {error}; restore the index or prepare the data again") from error
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{where} is not a readable {kind} ({reason(error)}); prepare the data again") from error
    return entries


def check_count(what: str, value: object) -> None:
    """Check that ``value``, from an index, counts something.

    Raises:
        DataError: It is no integer, negative, or more than any file has bytes.
    """
    if type(value) is not int or not 0 <= value <= _MAX_COUNT:
        raise DataError(f"{what} is {reprlib.repr(value)}; allowed: an integer of 0 to {_MAX_COUNT}")


def _is_plain_name(name: object) -> bool:
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\0" in name:
        return False
    try:
        return len(os.fsencode(name)) <= _MAX_NAME
    except UnicodeEncodeError:
        return False


@cache
def _is_known_hash(algorithm: str) -> bool:
    """Whether it is a hash of fixed length; ``shake`` gives as many digits as it is asked for."""
    if algorithm in xxhash.algorithms_available:
        return True
    try:
        return hashlib.new(algorithm).digest_size > 0
    except ValueError:
        return False


def hash_file(path: Path, algorithm: str) -> str:
    """Return the hex digest of a file, read through a memory map."""
    digest = getattr(xxhash, algorithm)() if algorithm in xxhash.algorithms_available else hashlib.new(algorithm)
    if path.stat().st_size:
        digest.update(np.memmap(path, np.uint8, mode="r").data)
    return digest.hexdigest()
