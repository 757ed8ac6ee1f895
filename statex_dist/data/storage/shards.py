"""What is known of a shard before it is opened, and what an open shard offers, whatever its format."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xxhash

from statex_dist.data.store import Piece
from statex_dist.errors import DataError

TOKENS = "tokens"
LOSS_MASK = "loss_mask"
TOKEN_DTYPES = ("uint8", "uint16", "uint32", "int32", "int64")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file of a shard as the index describes it.

    Attributes:
        name: Plain file name, beside the index.
        size: Its bytes.
        hashes: Hex digests by algorithm (``hashlib``'s or ``xxhash``'s names); may be empty.
    """

    name: str
    size: int
    hashes: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if Path(self.name).name != self.name:
            raise DataError(f"{self.name!r} is not a plain file name")

    def verify(self, path: Path) -> None:
        """Check the file at ``path``.

        Raises:
            DataError: Its size or one of its hashes differs.
        """
        try:
            size = path.stat().st_size
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}; restore it or prepare the data again") from error
        if size != self.size:
            raise DataError(
                f"{path} has {size} bytes, the index says {self.size}; restore it or prepare the data again"
            )
        for name, expected in self.hashes.items():
            if hash_file(path, name) != expected:
                raise DataError(
                    f"{path} is damaged ({name} differs from the index); restore it or prepare the data again"
                )


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
    """

    raw: FileEntry
    packed: FileEntry | None = None
    compression: str | None = None
    companion: FileEntry | None = None
    documents: int
    details: Mapping[str, Any] = field(default_factory=dict)


class OpenShard(Protocol):
    """A shard that is open for random access.

    Attributes:
        lengths: ``[documents]`` integers, tokens of each document.
    """

    @property
    def lengths(self) -> np.ndarray: ...  # noqa: D102 - documented by the class

    def read(self, i: int, start: int, stop: int) -> Piece:
        """Return tokens ``start..stop`` of document ``i``, as views of the mapped file."""
        ...


def hash_file(path: Path, algorithm: str) -> str:
    """Return the hex digest of a file, read through a memory map."""
    digest = getattr(xxhash, algorithm)() if algorithm in xxhash.algorithms_available else hashlib.new(algorithm)
    if path.stat().st_size:
        digest.update(np.memmap(path, np.uint8, mode="r").data)
    return digest.hexdigest()
