"""Where a dataset's files are, and how a shard becomes a verified local file.

A dataset lies in a directory or behind a URL. What is remote is downloaded, and what is compressed is unpacked, once,
into a cache below ``cache_dir / namespace`` that all processes of a machine share.
"""

from __future__ import annotations

import bz2
import gzip
import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from statex_dist.data.shards import FileEntry, ShardEntry
from statex_dist.errors import DataError, ShardError

log = logging.getLogger(__name__)


class DatasetFiles(Protocol):
    """The files of one dataset.

    Attributes:
        origin: The directory or URL, for messages.
    """

    @property
    def origin(self) -> str: ...  # noqa: D102 - documented by the class

    def small(self, name: str) -> Path | None:
        """Return a local copy of a small file beside the shards (index, manifest, lengths), or ``None`` if missing.

        Raises:
            DataError: It is there but cannot be fetched.
        """
        ...

    def fetch(self, shard: ShardEntry) -> Path:
        """Return the verified raw file of ``shard``, with its companion beside it; fetch it where needed.

        Raises:
            ShardError: It is missing, damaged or cannot be fetched.
        """
        ...

    def prefetch(self, shards: Sequence[ShardEntry]) -> None:
        """Begin to fetch ``shards`` in the background, in this order."""
        ...


def default_cache_dir() -> Path:
    """Return ``$XDG_CACHE_HOME/statex`` or ``~/.cache/statex``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "statex"


def write_atomically(target: Path, content: bytes) -> None:
    """Write a file of the cache; processes that write the same one at once do not disturb each other."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}.{threading.get_ident()}")
    partial.write_bytes(content)
    partial.replace(target)


class LocalFiles:
    """A dataset in a directory of this machine; shards that are there only compressed are unpacked into a cache.

    Args:
        directory: The dataset.
        cache: Where unpacked shards go.
    """

    def __init__(self, directory: Path, cache: Path):
        self.directory = directory
        self.origin = str(directory)
        self._cache = cache
        self._checked: set[Path] = set()

    def small(self, name: str) -> Path | None:
        """Return the path of ``name``, or ``None`` if it is missing."""
        path = self.directory / name
        return path if path.is_file() else None

    def fetch(self, shard: ShardEntry) -> Path:
        """Return the verified raw file of ``shard``."""
        try:
            path = self.directory / shard.raw.name
            if path.exists():
                self._verify(path, shard.raw)
                return path
            if shard.packed is not None and (self.directory / shard.packed.name).exists():
                return self._unpack(self.directory / shard.packed.name, shard)
        except ShardError:
            raise
        except DataError as error:
            raise ShardError(str(error)) from error
        wanted = shard.raw.name + (f" or {shard.packed.name}" if shard.packed else "")
        raise ShardError(f"{self.directory}: shard {wanted} is missing; restore it or prepare the dataset again")

    def prefetch(self, shards: Sequence[ShardEntry]) -> None:
        """Local shards are read where they are."""

    def _verify(self, path: Path, file: FileEntry) -> None:
        if path not in self._checked:
            file.verify(path)
            self._checked.add(path)

    def _unpack(self, source: Path, shard: ShardEntry) -> Path:
        assert shard.packed is not None
        target = self._cache / shard.raw.name
        if target.exists():
            try:
                self._verify(target, shard.raw)
                return target
            except DataError as error:
                log.warning("%s; unpacking %s again", error, source)
        self._verify(source, shard.packed)
        content = decompress(shard, source)
        write_atomically(target, content)
        self._verify(target, shard.raw)
        return target


def decompress(shard: ShardEntry, source: Path) -> bytes:
    """Return the raw bytes of ``shard`` from its compressed file.

    Raises:
        ShardError: The compression is unknown, or the file is not of that compression.
    """
    codec = (shard.compression or "").partition(":")[0]
    try:
        content = source.read_bytes()
        if codec == "zstd":
            import zstd

            return zstd.decompress(content)
        if codec in ("gz", "bz2"):
            return gzip.decompress(content) if codec == "gz" else bz2.decompress(content)
    except Exception as error:
        # Each codec has its own exception type; whatever it is, the file is not what the index says.
        raise ShardError(f"{source} cannot be unpacked ({error}); restore it or prepare the dataset again") from error
    raise ShardError(f"{source}: compression {shard.compression!r} is not read here; allowed: none, zstd, gz, bz2")
