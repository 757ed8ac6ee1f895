"""Where a dataset's files are, and how a shard becomes a verified local file.

A dataset lies in a directory or behind a URL. What is remote is downloaded, and what is compressed is unpacked, once,
into a cache that all processes of a machine share (:mod:`statex_dist.data.storage.cache`).
"""

from __future__ import annotations

import bz2
import gzip
import logging
import os
import shutil
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from statex_dist.data.storage.cache import ShardCache, bytes_needed
from statex_dist.data.storage.remote import MissingObjectError, RemoteDirectory, RetryPolicy, split_url
from statex_dist.data.storage.shards import FileEntry, ShardEntry
from statex_dist.errors import DataError, ShardError

log = logging.getLogger(__name__)

_BACKGROUND_THREADS = 4


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

    def require_room(self, shards: Sequence[ShardEntry]) -> None:
        """Check that the cache's limit lets one of ``shards`` be fetched while another is read.

        Raises:
            ConfigError: It does not.
        """
        ...

    def used(self, shards: Sequence[ShardEntry]) -> None:
        """Note that ``shards``, in this order, were read lately: a cache with a limit removes others first."""
        ...

    def prefetch(self, shards: Sequence[ShardEntry]) -> None:
        """Begin to fetch ``shards`` in the background, in this order."""
        ...


def open_files(path: str | Path, cache: ShardCache, policy: RetryPolicy) -> DatasetFiles:
    """Return the files of the dataset at a directory or URL.

    Raises:
        ConfigError: It is a URL of a scheme that is not known.
    """
    url = split_url(path)
    if url is None:
        return LocalFiles(Path(path), cache)
    if url[0] in ("local", "file"):
        parts = urlsplit(url[1])
        return LocalFiles(Path(unquote(parts.netloc + parts.path)), cache)
    return RemoteFiles(RemoteDirectory(url[1], policy), cache)


def default_cache_dir() -> Path:
    """Return ``$XDG_CACHE_HOME/statex`` or ``~/.cache/statex``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "statex"


def write_atomically(target: Path, content: bytes) -> None:
    """Write a file of the cache; processes that write the same one at once do not disturb each other."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        partial.write_bytes(content)
        partial.replace(target)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


class LocalFiles:
    """A dataset in a directory of this machine; shards that are there only compressed are unpacked into the cache.

    Args:
        directory: The dataset.
        cache: Where unpacked shards go.
    """

    def __init__(self, directory: Path, cache: ShardCache):
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
        path = self.directory / shard.raw.name
        try:
            if path.exists():
                self._verify(path, shard.raw)
                if shard.companion is not None:
                    self._verify(self.directory / shard.companion.name, shard.companion)
                return path
            if shard.packed is not None and (self.directory / shard.packed.name).exists():
                return self._cache.fetch(self._identity, shard, partial(self._unpack, shard))
        except ShardError:
            raise
        except DataError as error:
            raise ShardError(str(error)) from error
        wanted = shard.raw.name + (f" or {shard.packed.name}" if shard.packed else "")
        raise ShardError(f"{self.directory}: shard {wanted} is missing; restore it or prepare the dataset again")

    def require_room(self, shards: Sequence[ShardEntry]) -> None:
        """Check that those of ``shards`` that are compressed can be unpacked."""
        self._cache.require_room([shard for shard in shards if shard.packed is not None])

    def used(self, shards: Sequence[ShardEntry]) -> None:
        """Note that ``shards`` are in use."""
        self._cache.touch(self._identity, [shard for shard in shards if shard.packed is not None])

    def prefetch(self, shards: Sequence[ShardEntry]) -> None:
        """Local shards are read where they are."""

    @property
    def _identity(self) -> str:
        return str(self.directory.resolve())

    def _verify(self, path: Path, file: FileEntry) -> None:
        if path not in self._checked:
            file.verify(path)
            self._checked.add(path)

    def _unpack(self, shard: ShardEntry, directory: Path) -> None:
        assert shard.packed is not None
        source = self.directory / shard.packed.name
        shard.packed.verify(source)
        raw = directory / shard.raw.name
        raw.write_bytes(decompress(shard, source))
        shard.raw.verify(raw)
        if shard.companion is not None:
            beside = self.directory / shard.companion.name
            shard.companion.verify(beside)
            shutil.copyfile(beside, directory / beside.name)


class RemoteFiles:
    """A dataset behind a URL; its shards are downloaded into the cache.

    Args:
        remote: The dataset.
        cache: Where downloaded shards go.
    """

    def __init__(self, remote: RemoteDirectory, cache: ShardCache):
        self.origin = remote.origin
        self._remote = remote
        self._cache = cache
        self._background = _Background(partial(self._fetch, urgent=False))

    def small(self, name: str) -> Path | None:
        """Download ``name`` and return its path, or ``None`` if the remote has none."""
        # With a suffix, it is no shard of the cache.
        kept = self._cache.dataset_directory(self.origin) / "small.files" / name
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=kept.parent) as arriving:
                self._remote.download(name, Path(arriving) / name)
                return (Path(arriving) / name).replace(kept)
        except MissingObjectError:
            return None
        except OSError as error:
            raise DataError(
                f"the cache {self._cache.directory} cannot be used ({error}); set cache_dir to another directory"
            ) from error

    def fetch(self, shard: ShardEntry) -> Path:
        """Return the verified raw file of ``shard``; download it where needed."""
        return self._fetch(shard, urgent=True)

    def _fetch(self, shard: ShardEntry, urgent: bool) -> Path:
        return self._cache.fetch(self.origin, shard, partial(self._download, shard), urgent=urgent)

    def require_room(self, shards: Sequence[ShardEntry]) -> None:
        """Check that ``shards`` can be downloaded."""
        self._cache.require_room(shards)

    def used(self, shards: Sequence[ShardEntry]) -> None:
        """Note that ``shards`` are in use."""
        self._cache.touch(self.origin, shards)

    def prefetch(self, shards: Sequence[ShardEntry]) -> None:
        """Begin to download ``shards``: those first ones that the cache holds together, with one more beside them."""
        wanted = list(shards)
        if self._cache.limit is not None:
            needed = [bytes_needed(shard) for shard in wanted]
            room = self._cache.limit - max(needed, default=0)
            wanted = [shard for shard, total in zip(wanted, accumulate(needed), strict=True) if total <= room]
        self._cache.touch(self.origin, wanted)
        self._background.replace([shard for shard in wanted if not self._cache.holds(self.origin, shard)])

    def _download(self, shard: ShardEntry, directory: Path) -> None:
        try:
            packed = shard.packed
            if packed is not None:
                self._download_whole(packed, directory)
                raw = directory / shard.raw.name
                raw.write_bytes(decompress(shard, directory / packed.name))
                (directory / packed.name).unlink()
                shard.raw.verify(raw)
            else:
                self._download_whole(shard.raw, directory)
            if shard.companion is not None:
                self._download_whole(shard.companion, directory)
        except DataError as error:
            raise ShardError(str(error).replace(str(directory), self.origin)) from error

    def _download_whole(self, file: FileEntry, directory: Path) -> None:
        """Download a file that has the hashes of the index: damage on the way is not there the second time."""
        path = directory / file.name
        for last in (False, True):
            self._remote.download(file.name, path, file.size)
            try:
                file.verify(path)
                return
            except DataError as error:
                reason = str(error).partition(";")[0].replace(str(directory), self.origin)
                if last:
                    raise ShardError(
                        f"{reason}, downloaded twice: the remote copy is damaged; restore it or prepare the dataset "
                        "again"
                    ) from error
                log.warning("%s; downloading it again", reason)


class _Background:
    """Fetches ahead of need, in daemon threads: they keep no process alive, and a forked child starts its own.

    What fails here fails again, and loudly, when it is needed.
    """

    def __init__(self, fetch: Callable[[ShardEntry], object]):
        self._fetch = fetch
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._waiting: deque[ShardEntry] = deque()
        self._threads = 0

    def replace(self, shards: Sequence[ShardEntry]) -> None:
        """Fetch ``shards`` in this order, instead of those that no thread has begun."""
        if self._pid != os.getpid():
            self._reset()  # the parent's threads do not exist here, and one may have held the lock
        with self._lock:
            self._waiting = deque(shards)
            for _ in range(min(_BACKGROUND_THREADS - self._threads, len(self._waiting))):
                threading.Thread(target=self._work, name="statex-fetch", daemon=True).start()
                self._threads += 1

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._threads -= 1
                    return
                shard = self._waiting.popleft()
            try:
                self._fetch(shard)
            except Exception as error:
                log.debug("in the background: %s", error)


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
