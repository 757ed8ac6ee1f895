"""The cache of fetched and unpacked shards that all processes of a machine share.

A shard is a directory with its raw file and its companion. It appears in one rename, so a shard that exists is whole.
Below the cache directory::

    lock                      held briefly by a process that counts shards, frees space or removes shards
    <dataset>/<shard>/        a whole shard; the newest time of its files is its last use
    <dataset>/<shard>.lock    held (flock) by the process that fetches the shard; the others wait
    <dataset>/<shard>.partial/  the shard while it is being fetched, with the bytes that it will need in ``reserved``
    trash/                    shards that are being removed

The kernel releases a lock when the process that held it ends, so a killed process blocks no other. A ``.partial`` whose
lock is free belongs to a dead process. A process that has mapped a shard keeps its data when the shard is removed.
"""

from __future__ import annotations

import contextlib
import heapq
import logging
import os
import random
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path

from statex_dist.data.storage.schemes import is_disk_full
from statex_dist.data.storage.shards import ShardEntry
from statex_dist.durable.lock import LockHeldError, acquire
from statex_dist.errors import ConfigError, DataError, ShardError

log = logging.getLogger(__name__)

_POLL_SECONDS = 0.02
_PATIENCE_SECONDS = 60.0
_ATTEMPTS_ALONE = 3
_ATTEMPTS_BESIDE_OTHERS = 20
_LONGEST_PAUSE_SECONDS = 0.5
_RESERVED = "reserved"
_PARTIAL = ".partial"


class CacheFullError(ShardError):
    """The space does not suffice for a shard, even with all others removed; mapped ones still take their space."""


class ShardCache:
    """Whole, verified shards below a directory.

    Args:
        directory: The cache; made when it is first needed.
        limit: Bytes that its shards may take, or ``None``. The least recently used ones are removed beyond it.
    """

    def __init__(self, directory: Path, limit: int | None = None):
        self.directory = directory
        self.limit = limit
        self._verified: dict[Path, int] = {}
        self._swept = False

    def require_room(self, shards: Sequence[ShardEntry]) -> None:
        """Check that the limit lets one of ``shards`` be fetched while another is read.

        Raises:
            ConfigError: It does not.
        """
        needed = sum(heapq.nlargest(2, (bytes_needed(shard) for shard in shards)))
        if self.limit is not None and self.limit < needed:
            raise ConfigError(
                f"cache_limit {self.limit} bytes does not hold the two largest shards, packed and unpacked; set it to "
                f"{needed} or more, or leave it out"
            )

    def dataset_directory(self, origin: str) -> Path:
        """Return where the files of the dataset from ``origin`` lie."""
        return self.directory / _digest(origin)

    def holds(self, origin: str, shard: ShardEntry) -> bool:
        """Return whether ``shard`` is there."""
        return (self._place(origin, shard) / shard.raw.name).exists()

    def touch(self, origin: str, shards: Sequence[ShardEntry]) -> None:
        """Note that ``shards``, in this order, were used just now, where they are there."""
        for shard in shards:
            _touch(self._place(origin, shard) / shard.raw.name)

    def fetch(self, origin: str, shard: ShardEntry, make: Callable[[Path], None], *, urgent: bool = True) -> Path:
        """Return the verified raw file of ``shard``, its companion beside it; make them where needed.

        The first use in each process verifies them. A limit may remove them again at any time, so a caller that finds
        the path missing fetches it again.

        Args:
            origin: Which dataset it is of.
            shard: What the index says.
            make: Puts the shard's files, verified, into the empty directory given; called by one process at a time.
            urgent: Whether to remove all other shards if the disk is full.

        Raises:
            ShardError: ``make`` failed, or there is no room.
        """
        place = self._place(origin, shard)
        path = place / shard.raw.name
        if self._problem(path, shard) is None:
            return path
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with _locked(_lock_of(place), shard.raw.name):
                # Another process may have fetched it since. Only the holder of the lock removes damaged ones.
                problem = self._problem(path, shard)
                if problem is None:
                    return path
                if place.exists():
                    log.warning("%s; fetching it again from %s", problem, origin)
                    with self._counting():
                        self._remove([place])
                self._make(place, shard, make, urgent)
            return path
        except OSError as error:
            raise ShardError(
                f"{origin}/{shard.raw.name}: the cache {self.directory} cannot be used ({error}); make it writable or "
                "set cache_dir to another directory"
            ) from error

    def _place(self, origin: str, shard: ShardEntry) -> Path:
        """A directory of its own for every content: a dataset that was replaced at its origin is another one."""
        files = [(f.name, f.size, sorted(f.hashes.items())) for f in (shard.raw, shard.packed, shard.companion) if f]
        return self.dataset_directory(origin) / _digest(repr((files, shard.documents)))

    def _problem(self, path: Path, shard: ShardEntry) -> str | None:
        """Why the cached shard cannot be used, or ``None``."""
        try:
            inode = path.stat().st_ino
            if self._verified.get(path) != inode:
                shard.raw.verify(path)
                if shard.companion is not None:
                    shard.companion.verify(path.with_name(shard.companion.name))
                self._verified[path] = inode
        except (OSError, DataError) as error:
            return str(error).partition(";")[0]
        _touch(path)
        return None

    def _make(self, place: Path, shard: ShardEntry, make: Callable[[Path], None], urgent: bool) -> None:
        needed = bytes_needed(shard)
        alone = 0
        for attempt in range(_ATTEMPTS_BESIDE_OTHERS):
            try:
                with self._room(place, needed) as partial:
                    whole = partial / "whole"
                    whole.mkdir()
                    make(whole)
                    inode = (whole / shard.raw.name).stat().st_ino
                    whole.rename(place)  # from here on another process may remove it, to make room
                    self._verified[place / shard.raw.name] = inode
                return
            except OSError as error:
                if not is_disk_full(error):
                    raise
                with self._counting():
                    alone += self._reserved_by_others(place) == 0
                    if urgent:
                        self._remove(_whole_shards(self.directory))
                # What others are fetching takes room too, and can be removed when they are done.
                if not urgent or alone == _ATTEMPTS_ALONE or attempt + 1 == _ATTEMPTS_BESIDE_OTHERS:
                    raise CacheFullError(
                        f"{shard.raw.name}: no room in the cache {self.directory} ({error.strerror}): {needed} bytes "
                        f"are needed, {shutil.disk_usage(self.directory).free} are free; free some, or set cache_dir "
                        "to a larger disk"
                    ) from error
                log.warning("%s: the cache %s is full; removed all its shards", shard.raw.name, self.directory)
            time.sleep(random.uniform(0, _LONGEST_PAUSE_SECONDS))

    @contextlib.contextmanager
    def _room(self, place: Path, needed: int) -> Iterator[Path]:
        """Reserve ``needed`` bytes and give the empty directory that will take them."""
        partial = _partial_of(place)
        try:
            while True:
                with self._counting():
                    if self._make_room(place, needed):
                        partial.mkdir()
                        (partial / _RESERVED).write_text(str(needed))
                        break
                time.sleep(_POLL_SECONDS)  # others are fetching; theirs can be removed when they are done
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _make_room(self, place: Path, needed: int) -> bool:
        shutil.rmtree(_partial_of(place), ignore_errors=True)  # we hold its lock, so it is a dead process's
        if self.limit is None:
            if not self._swept:
                self._reserved_by_others(place)
                self._swept = True
            return True
        room = self.limit - needed - self._reserved_by_others(place)
        shards = [(*_size_and_use(shard), shard) for shard in _whole_shards(self.directory)]
        excess = sum(size for size, _, _ in shards) - room
        if room < 0 or excess <= 0:
            return room >= 0
        removed = []
        for size, _, shard in sorted(shards, key=lambda found: found[1]):
            if excess <= 0:
                break
            removed.append(shard)
            excess -= size
        self._remove(removed)
        return True

    def _reserved_by_others(self, place: Path) -> int:
        """Bytes that are being fetched now; what dead processes left is removed."""
        total = 0
        for partial in self.directory.glob(f"*/*{_PARTIAL}"):
            if partial == _partial_of(place):
                continue
            with contextlib.suppress(LockHeldError), acquire(_lock_of(partial.with_suffix(""))):
                if partial.exists():  # else its process has just put the shard into its place
                    log.warning("removing %s, left by a process that ended while it fetched", partial)
                    shutil.rmtree(partial, ignore_errors=True)
            with contextlib.suppress(FileNotFoundError, ValueError):
                total += int((partial / _RESERVED).read_text())
        return total

    def _counting(self) -> contextlib.AbstractContextManager[None]:
        return _locked(self.directory / "lock", "room in the cache")

    def _remove(self, shards: Sequence[Path]) -> None:
        trash = self.directory / "trash"
        trash.mkdir(exist_ok=True)
        for shard in shards:
            with contextlib.suppress(FileNotFoundError):
                shard.rename(trash / uuid.uuid4().hex)  # at once: no process sees a raw file without its companion
        shutil.rmtree(trash, ignore_errors=True)


def bytes_needed(shard: ShardEntry) -> int:
    """Return the bytes that fetching ``shard`` takes at most."""
    return sum(file.size for file in (shard.raw, shard.packed, shard.companion) if file is not None)


def _whole_shards(cache: Path) -> list[Path]:
    return [path for path in cache.glob("*/*") if path.is_dir() and not path.suffix and path.parent.name != "trash"]


def _size_and_use(shard: Path) -> tuple[int, float]:
    """Return the bytes of a shard's files and the time of its last use."""
    size, used = 0, 0.0
    with contextlib.suppress(FileNotFoundError):  # a user may delete files by hand
        for file in shard.iterdir():
            status = file.stat()
            size, used = size + status.st_size, max(used, status.st_mtime)
    return size, used


def _touch(path: Path) -> None:
    # Gone, or of another user.
    with contextlib.suppress(FileNotFoundError, PermissionError):
        now = time.time_ns()  # finer than the kernel's own clock for files
        os.utime(path, ns=(now, now))


def _lock_of(place: Path) -> Path:
    return place.with_name(place.name + ".lock")


def _partial_of(place: Path) -> Path:
    return place.with_name(place.name + _PARTIAL)


def _digest(text: str) -> str:
    return blake2b(text.encode(), digest_size=12).hexdigest()


@contextlib.contextmanager
def _locked(path: Path, what: str) -> Iterator[None]:
    while True:
        try:
            lock = acquire(path, wait=_PATIENCE_SECONDS, poll=_POLL_SECONDS)
            break
        except LockHeldError:
            log.warning("still waiting for another process: %s (%s)", what, path)
    with lock:
        yield
