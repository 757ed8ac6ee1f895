"""Documents in shard files: one store for every format, local or remote.

Planning reads only the lengths of all documents; a shard is fetched, verified and mapped when its first token is read,
and must then have the lengths that the plan was made from.
"""

from __future__ import annotations

import functools
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np

from statex_dist.checkpoint.formats.raw_io import MOST_OPEN_FILES, allow_open_files
from statex_dist.data.manifest import DatasetManifest, hash_lengths
from statex_dist.data.storage.cache import CacheFullError
from statex_dist.data.storage.files import DatasetFiles
from statex_dist.data.storage.shards import MappedShard, ShardEntry
from statex_dist.data.store import DocumentSlice
from statex_dist.errors import CorruptShardError, DataError, ShardError

_TIDY_SECONDS = 1.0
_MAX_MAPS = Path("/proc/sys/vm/max_map_count")
_STORES: weakref.WeakSet[DiskStore] = weakref.WeakSet()
"""All stores of this process: its limits are theirs together."""


class DiskStore:
    """A :class:`~statex_dist.data.store.ShardStore` over shard files."""

    def __init__(
        self,
        files: DatasetFiles,
        entries: Sequence[ShardEntry],
        open_shard: Callable[[Path, ShardEntry], MappedShard],
        *,
        lengths: np.ndarray,
        has_loss_mask: bool,
        manifest: DatasetManifest | None = None,
    ):
        self.files = files
        self.entries = list(entries)
        self.manifest = manifest
        self.has_loss_mask = has_loss_mask
        self.num_shards = len(self.entries)
        self.fingerprint = fingerprint(self.entries, hash_lengths(lengths))
        self._open_shard = open_shard
        self._begin = np.concatenate([[0], np.cumsum([entry.documents for entry in self.entries])]).astype(np.int64)
        if self._begin[-1] != len(lengths):
            raise DataError(f"{files.origin}: {len(lengths)} lengths for {self._begin[-1]} documents; prepare it again")
        self._lengths = lengths
        self._tokens = [int(self.lengths(shard).sum()) for shard in range(self.num_shards)]
        self._open: OrderedDict[int, MappedShard] = OrderedDict()
        self._paths: dict[int, Path] = {}
        self._compared: dict[int, tuple[int, int, int]] = {}
        self._tidied = time.monotonic()
        _STORES.add(self)
        # Several threads read: the loader's, and its owner's.
        self._lock = threading.RLock()

    def name(self, shard: int) -> str:
        """Return what to call ``shard`` in a message."""
        return f"{self.files.origin}/{self.entries[shard].raw.name}"

    def lengths(self, shard: int) -> np.ndarray:
        """Return the tokens of each document of ``shard``: ``[documents]`` int64."""
        return self._lengths[self._begin[shard] : self._begin[shard + 1]].astype(np.int64)

    def num_tokens(self, shard: int) -> int:
        """Return the tokens of ``shard``."""
        return self._tokens[shard]

    def read(self, shard: int, i: int, start: int, stop: int) -> DocumentSlice:
        """Return tokens ``start..stop`` of document ``i``, as views of the mapped shard."""
        return self._shard(shard).read(i, start, stop)

    def prefetch(self, shards: Sequence[int], share: float = 1.0) -> None:
        """Begin to fetch ``shards`` in the background, in this order, into ``share`` of the cache."""
        self.files.prefetch([self.entries[shard] for shard in shards], share)

    def _shard(self, index: int) -> MappedShard:
        with self._lock:
            shard = self._open.get(index)
            if shard is None:
                shard = self._opened(index)
                self._open[index] = shard
                while len(self._open) > 1 and len(self._open) > max_open_shards(len(self._open)):
                    self._open.popitem(last=False)
            else:
                self._open.move_to_end(index)
            return shard

    def _opened(self, index: int) -> MappedShard:
        # Only what is fetched removes others from a cache, here or in the background: no reason to look at all of them
        # for each shard that is mapped again.
        tidy = not self.files.holds(self.entries[index]) or time.monotonic() - self._tidied >= _TIDY_SECONDS
        if tidy:
            self.files.used([self.entries[i] for i in self._open])
        try:
            shard = self._checked(index)
        except CacheFullError:
            self._close_evicted()
            shard = self._checked(index)
        if tidy:
            self._close_evicted()
            self._tidied = time.monotonic()
        return shard

    def _close_evicted(self) -> None:
        """Let go of shards that a cache with a limit removed: a file keeps its disk space while it is mapped."""
        for index in [index for index in self._open if not self._paths[index].exists()]:
            del self._open[index]

    def _checked(self, index: int) -> MappedShard:
        self._paths[index], shard = fetch_and_open(self.files, self.entries[index], self._open_shard)
        file = _identity(self._paths[index])
        if file is None or self._compared.get(index) != file:
            if not np.array_equal(shard.lengths, self.lengths(index)):
                raise CorruptShardError(
                    f"{self._paths[index]}: its documents are not those that the dataset's list of lengths counts; the "
                    "files are not of one dataset: prepare it again"
                )
            if file is not None:
                self._compared[index] = file
        return shard


def max_open_shards(wanted: int) -> int:
    """Return how many shards each store of this process may keep mapped, where one would like ``wanted``.

    A map keeps a descriptor, and half of them are left to others. Where they do not suffice, the process's soft limit
    is raised as far as the hard one allows.
    """
    stores = max(1, len(_STORES))
    return min(allow_open_files(2 * wanted * stores), _max_maps()) // 2 // stores


@functools.cache
def _max_maps() -> int:
    try:
        return int(_MAX_MAPS.read_text())
    except (OSError, ValueError):  # another system than Linux
        return MOST_OPEN_FILES


def _identity(path: Path) -> tuple[int, int, int] | None:
    """Return values that differ if another file takes the path (no times: use changes them); ``None`` if removed."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size


def fetch_and_open(
    files: DatasetFiles, entry: ShardEntry, open_shard: Callable[[Path, ShardEntry], MappedShard], attempts: int = 3
) -> tuple[Path, MappedShard]:
    """Return the raw file of a shard and the shard, open.

    If another process that frees space in the cache removes the file before it is mapped, it is fetched again.

    Raises:
        CorruptShardError: It is missing or damaged at its origin, or differs from the entry.
        ShardError: It cannot be fetched or mapped.
    """
    path = files.fetch(entry)
    try:
        return path, open_shard(path, entry)
    except (DataError, OSError) as error:
        if path.exists() or attempts == 1:
            # Descriptors or memory that are used up say nothing of the shard, and neither does a file that is gone
            # again.
            systems = error if isinstance(error, OSError) else error.__cause__
            here = isinstance(systems, OSError) and systems.errno is not None
            kind = ShardError if here or not path.exists() else CorruptShardError
            raise kind(str(error)) from error
    return fetch_and_open(files, entry, open_shard, attempts - 1)


def fingerprint(entries: Sequence[ShardEntry], lengths_hash: str) -> str:
    """Return a digest of the raw shards' sizes and hashes and of all lengths: equal for equal data."""
    files = [(entry.documents, entry.raw.size, sorted(entry.raw.hashes.items())) for entry in entries]
    return blake2b(repr((files, lengths_hash)).encode(), digest_size=16).hexdigest()
