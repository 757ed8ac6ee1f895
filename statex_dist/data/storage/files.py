"""Where a dataset's files are, and how a shard becomes a verified local file.

A dataset lies in a directory or behind a URL. Remote files are downloaded and compressed files are unpacked, once each,
into a cache that all processes of a machine share (:mod:`statex_dist.data.storage.cache`).
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from urllib.parse import unquote, urlsplit

from statex_dist.data.compression import CODECS, open_codec
from statex_dist.data.storage.cache import ShardCache, bytes_needed
from statex_dist.data.storage.remote import (
    DamagedObjectError,
    MissingObjectError,
    RemoteDirectory,
    RetryPolicy,
)
from statex_dist.data.storage.schemes import split_url
from statex_dist.data.storage.shards import FileEntry, ShardEntry
from statex_dist.errors import CorruptShardError, DataError, ShardError

log = logging.getLogger(__name__)

_BACKGROUND_THREADS = 4
_PIECE_BYTES = 1 << 20


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


class LocalFiles:
    """A dataset in a directory of this machine; shards that are there only compressed are unpacked into the cache."""

    def __init__(self, directory: Path, cache: ShardCache):
        self.directory = directory
        self.origin = str(directory)
        self._cache = cache
        self._checked: set[Path] = set()

    def small(self, name: str) -> Path | None:
        """Return the path of a small file beside the shards (index, manifest, lengths), or ``None`` if missing."""
        path = self.directory / name
        return path if path.is_file() else None

    def fetch(self, shard: ShardEntry) -> Path:
        """Return the verified raw file of ``shard``, with its companion beside it; unpack it where needed.

        Raises:
            CorruptShardError: It is missing or damaged.
            ShardError: It cannot be read.
        """
        path = self.directory / shard.raw.name
        try:
            if path.exists():
                self._verify(path, shard.raw)
                if shard.companion is not None:
                    self._verify(self.directory / shard.companion.name, shard.companion)
                return path
            if shard.packed is not None and (self.directory / shard.packed.name).exists():
                return self._cache.fetch(self._identity, shard, partial(self._unpack, shard))
            there = self.directory.is_dir()
        except OSError as error:
            raise ShardError(f"{path} cannot be read: {error.strerror}; make the dataset readable") from error
        if not there:
            raise ShardError(f"{self.directory} is gone, with all shards; mount it again, or correct the path")
        wanted = shard.raw.name + (f" or {shard.packed.name}" if shard.packed else "")
        raise CorruptShardError(f"{self.directory}: shard {wanted} is missing; restore it or prepare the dataset again")

    def holds(self, shard: ShardEntry) -> bool:
        """Return whether ``shard`` is readable where it is or unpacked, so that no other leaves the cache for it."""
        return (self.directory / shard.raw.name).exists() or self._cache.holds(self._identity, shard)

    def require_room(self, shards: Sequence[ShardEntry]) -> None:
        """Check that those of ``shards`` that are compressed can be unpacked."""
        self._cache.require_room([shard for shard in shards if shard.packed is not None])

    def used(self, shards: Sequence[ShardEntry]) -> None:
        """Note that ``shards``, in this order, were read lately: a cache with a limit removes others first."""
        self._cache.touch(self._identity, [shard for shard in shards if shard.packed is not None])

    def prefetch(self, shards: Sequence[ShardEntry], share: float = 1.0) -> None:
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
        decompress(shard, source, raw)
        shard.raw.verify(raw)
        if shard.companion is not None:
            beside = self.directory / shard.companion.name
            shard.companion.verify(beside)
            shutil.copyfile(beside, directory / beside.name)


class RemoteFiles:
    """A dataset behind a URL; its shards are downloaded into the cache."""

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
        """Return the verified raw file of ``shard``, with its companion beside it; download it where needed.

        Raises:
            CorruptShardError: It is missing or damaged where it comes from.
            ShardError: It cannot be fetched.
        """
        return self._fetch(shard, urgent=True)

    def _fetch(self, shard: ShardEntry, urgent: bool) -> Path:
        return self._cache.fetch(self.origin, shard, partial(self._download, shard), urgent=urgent)

    def holds(self, shard: ShardEntry) -> bool:
        """Return whether ``shard`` is downloaded."""
        return self._cache.holds(self.origin, shard)

    def require_room(self, shards: Sequence[ShardEntry]) -> None:
        """Check that ``shards`` can be downloaded."""
        self._cache.require_room(shards)

    def used(self, shards: Sequence[ShardEntry]) -> None:
        """Note that ``shards``, in this order, were read lately: a cache with a limit removes others first."""
        self._cache.touch(self.origin, shards)

    def prefetch(self, shards: Sequence[ShardEntry], share: float = 1.0) -> None:
        """Begin to download ``shards``: those first ones that the share holds together, with one more beside them."""
        wanted = list(shards)
        if self._cache.limit is not None:
            needed = [bytes_needed(shard) for shard in wanted]
            room = self._cache.limit * share - max(needed, default=0)
            wanted = [shard for shard, total in zip(wanted, accumulate(needed), strict=True) if total <= room]
        self._cache.touch(self.origin, wanted)
        self._background.replace([shard for shard in wanted if not self._cache.holds(self.origin, shard)])

    def _download(self, shard: ShardEntry, directory: Path) -> None:
        try:
            packed = shard.packed
            if packed is not None:
                self._download_whole(packed, directory)
                raw = directory / shard.raw.name
                decompress(shard, directory / packed.name, raw)
                (directory / packed.name).unlink()
                shard.raw.verify(raw)
            else:
                self._download_whole(shard.raw, directory)
            if shard.companion is not None:
                self._download_whole(shard.companion, directory)
        except DataError as error:
            at_origin = isinstance(error, (CorruptShardError, DamagedObjectError, MissingObjectError))
            kind = CorruptShardError if at_origin else ShardError
            raise kind(str(error).replace(str(directory), self.origin)) from error

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
                    raise CorruptShardError(
                        f"{reason}, downloaded twice: the remote copy is damaged; restore it or prepare the dataset "
                        "again"
                    ) from error
                log.warning("%s; downloading it again", reason)


DatasetFiles = LocalFiles | RemoteFiles
"""The files of one dataset; ``origin`` is its directory or URL, for messages."""


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


def decompress(shard: ShardEntry, source: Path, target: Path) -> None:
    """Write the raw file of ``shard`` from its compressed one; never more of it than the index says.

    Raises:
        CorruptShardError: The file is not of that compression or unpacks to too much.
        ShardError: The compression is unknown, or the file cannot be read.
        OSError: ``target`` cannot be written.
    """
    total = 0
    with target.open("wb") as out:
        for piece in _unpacked_pieces(shard, source):
            total += len(piece)
            if total > shard.raw.size:
                raise CorruptShardError(
                    f"{source} unpacks to more than the {shard.raw.size} bytes that the index says; restore it or "
                    "prepare the dataset again"
                )
            out.write(piece)


def _unpacked_pieces(shard: ShardEntry, source: Path) -> Iterator[bytes]:
    codec = (shard.compression or "").partition(":")[0]
    if codec not in CODECS:
        raise ShardError(f"{source}: compression {shard.compression!r} is not read here; allowed: none, zstd, gz, bz2")
    try:
        with open_codec(source, codec) as stream:
            piece = stream.read(_PIECE_BYTES)
            while piece:
                yield piece
                piece = stream.read(_PIECE_BYTES)
    except Exception as error:
        # Each codec has its own exception type; whatever it is, the file is not what the index says, unless this
        # machine is to blame. (What a codec finds wrong is an OSError too, without a number.)
        here = isinstance(error, (MemoryError, ImportError)) or getattr(error, "errno", None) is not None
        kind = ShardError if here else CorruptShardError
        raise kind(f"{source} cannot be unpacked ({error}); restore it or prepare the dataset again") from error
