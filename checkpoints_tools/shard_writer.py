"""Writing the safetensors files of a directory: several tensors at a time, each file journaled when it is on disk.

Workers take tensors in the order of the files. Whoever finishes a file's last tensor flushes it and, while the disk is
busy, digests it from the page cache; meanwhile the others are at the next file. Then the file gets its final name and
is entered in the journal.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import xxhash

from checkpoints_tools.journal import Journal, ShardRecord
from checkpoints_tools.raw_io import write_from
from checkpoints_tools.safetensors_io import ShardLayout
from checkpoints_tools.tensor_io import Progress, TensorInfo, TensorSource, total_bytes
from checkpoints_tools.transfer import TensorJob, TensorStream
from statex_dist.checkpoint.manifest import FileRecord, digest_file
from statex_dist.errors import ConfigError

DEFAULT_SHARD_SIZE = 5 * 10**9

DEFAULT_WORKERS = 4
"""Threads: more than the cores of a small machine, because each of them also waits for the disk."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WriteOptions:
    """How a directory is written.

    Attributes:
        max_shard_size: Bytes of values per safetensors file.
        overwrite: Whether a target that is not empty is replaced.
        workers: Tensors read, made and written at a time; each needs two buffers.
        resume: Whether to go on with what a killed process left.
        allow_nonfinite: Whether NaN and Inf are copied.
    """

    max_shard_size: int = DEFAULT_SHARD_SIZE
    overwrite: bool = False
    workers: int = DEFAULT_WORKERS
    resume: bool = False
    allow_nonfinite: bool = False

    def __post_init__(self) -> None:
        for option, value in (("--workers", self.workers), ("--max-shard-size", self.max_shard_size)):
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{option} must be a whole number from 1, not {value!r}")


def write_shards(
    journal: Journal,
    source: TensorSource,
    jobs: Sequence[TensorJob],
    shards: Sequence[ShardLayout],
    options: WriteOptions,
    progress: Progress | None,
) -> None:
    """Write every shard that the journal does not have; the first failure stops all workers.

    Args:
        journal: Where finished shards are entered; its directory receives the files.
        source: Where kept values come from.
        jobs: Every tensor.
        shards: Where each of them goes.
        options: How to write.
        progress: Told of the bytes written.

    Raises:
        CheckpointError: The source fails.
        OSError: The disk refuses.
    """
    by_name = {job.info.name: job for job in jobs}
    counter = _Counter(shards, journal, progress)
    streams = threading.local()

    def write(shard: _OpenShard, info: TensorInfo) -> None:
        if not hasattr(streams, "own"):
            streams.own = TensorStream(source, allow_nonfinite=options.allow_nonfinite)
        if shard.write(by_name[info.name], streams.own, counter):
            journal.add(shard.layout.file, shard.finish())

    opened = [_OpenShard(shard, journal.directory) for shard in shards if shard.file not in journal.finished]
    with ThreadPoolExecutor(max_workers=options.workers, thread_name_prefix="tensor") as pool:
        futures = [pool.submit(write, shard, info) for shard in opened for info in shard.layout.tensors]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        finally:
            counter.stopped = True
            pool.shutdown(wait=True, cancel_futures=True)
            for shard in opened:
                shard.close()


class _StoppedError(Exception):
    """Ends a worker because another one has failed."""


class _Counter:
    """Bytes written so far, by all workers; and the flag that stops them."""

    def __init__(self, shards: Sequence[ShardLayout], journal: Journal, progress: Progress | None):
        sizes = {shard.file: total_bytes(shard.tensors) for shard in shards}
        self._total = sum(sizes.values())
        self._done = sum(size for file, size in sizes.items() if file in journal.finished)
        self._progress, self._lock = progress, threading.Lock()
        self.stopped = False

    def advance(self, count: int) -> None:
        """Count bytes, and tell the caller of it.

        Raises:
            _StoppedError: Another worker has failed.
        """
        if self.stopped:
            raise _StoppedError
        with self._lock:
            self._done += count
            if self._progress:
                self._progress(self._done, self._total)


class _OpenShard:
    """One file while its tensors are written, by any number of workers."""

    def __init__(self, layout: ShardLayout, directory: Path):
        self.layout = layout
        self._final, self._partial = directory / layout.file, directory / f"{layout.file}.partial"
        self._lock, self._descriptor = threading.Lock(), -1
        self._missing = len(layout.tensors)
        self._digests: dict[str, str] = {}
        self._source_digests: dict[str, str] = {}
        self._offsets: dict[str, int] = {}
        position = len(layout.header)
        for info in layout.tensors:
            self._offsets[info.name] = position
            position += info.nbytes

    def _open(self) -> int:
        """Return the file's descriptor, making the file on the first call: header written, all its space reserved."""
        with self._lock:
            if self._descriptor < 0:
                self._descriptor = os.open(self._partial, os.O_CREAT | os.O_TRUNC | os.O_RDWR, 0o666)
                os.posix_fallocate(self._descriptor, 0, self.layout.size)
                write_from(memoryview(self.layout.header), self._descriptor, 0)
            return self._descriptor

    def write(self, job: TensorJob, stream: TensorStream, counter: _Counter) -> bool:
        """Write one tensor; return whether it was the last one that the file lacked."""
        descriptor, digest = self._open(), xxhash.xxh3_128()
        start = position = self._offsets[job.info.name]
        for block in stream.blocks(job):
            write_from(block.data, descriptor, position)
            digest.update(block.data)
            position += len(block)
            counter.advance(len(block))
        assert position - start == job.info.nbytes, f"{job.info}: {position - start} bytes"
        with self._lock:
            self._digests[job.info.name] = digest.hexdigest()
            if job.surgery is None:
                self._source_digests[job.info.name] = stream.source_digest()
            self._missing -= 1
            return self._missing == 0

    def finish(self) -> ShardRecord:
        """Flush and digest the complete file and give it its final name."""
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="flush") as flusher:
            flushed = flusher.submit(os.fsync, self._descriptor)
            digest = digest_file(self._partial)
            flushed.result()
        self.close()
        self._partial.replace(self._final)
        order = [info.name for info in self.layout.tensors]
        return ShardRecord(
            record=FileRecord(size=self.layout.size, xxh3_128=digest),
            digests={name: self._digests[name] for name in order},
            source_digests={name: self._source_digests[name] for name in order if name in self._source_digests},
        )

    def close(self) -> None:
        """Close the file, finished or not."""
        with self._lock:
            if self._descriptor >= 0:
                os.close(self._descriptor)
                self._descriptor = -1
