"""The values of one output tensor as a stream of blocks: bytes copied from a source, new rows drawn, dtypes converted.

Both the writer and the verifier consume this stream, so what is proved of a checkpoint is what was meant to be written.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import numpy as np
import xxhash

from statex_dist.checkpoint.dtypes import cast, encode, has_nonfinite
from statex_dist.checkpoint.formats.piece_io import PieceReader, SourceCrcs
from statex_dist.checkpoint.formats.raw_io import BLOCK_BYTES
from statex_dist.checkpoint.formats.tensor_io import Piece, Pieces, Progress, TensorInfo, TensorSource
from statex_dist.checkpoint.layout import MANIFEST_NAME
from statex_dist.errors import CheckpointError
from statex_dist.models.row_mapping import Keep, TensorMapping


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorJob:
    """One tensor of a target.

    Attributes:
        info: As it is to be stored.
        source: As the source holds it; None for a tensor that the source has not.
        mapping: What becomes of its rows; None where all values are kept.
        state: Of which optimizer state it is; None for the weights themselves.
    """

    info: TensorInfo
    source: TensorInfo | None
    mapping: TensorMapping | None = None
    state: str | None = None

    @classmethod
    def copy(cls, info: TensorInfo, *, dtype: str | None = None, state: str | None = None) -> TensorJob:
        """Return the job of a tensor of which all values are kept, in another dtype where one is given."""
        return cls(info=info if dtype is None else replace(info, dtype=dtype), source=info, state=state)

    @property
    def key(self) -> str:
        """Key that distinguishes the tensor from all others of the target."""
        return self.info.name if self.state is None else f"{self.state}\0{self.info.name}"


class TensorStream:
    """Produces the bytes of jobs, one after the other, in buffers of its own (one stream per thread).

    Args:
        source: Where kept values come from.
        allow_nonfinite: Whether NaN and Inf may be copied; else they are an error.
        crcs: Where bytes of ``torch.save`` files are noted.
        most_files: Files of the source that are kept open.
    """

    def __init__(
        self,
        source: TensorSource,
        *,
        allow_nonfinite: bool,
        crcs: SourceCrcs | None = None,
        most_files: int | None = None,
    ):
        self._source, self._allow_nonfinite = source, allow_nonfinite
        self._reader = PieceReader(source.opened, crcs, source.ahead, most_files=most_files)
        self._buffer = np.empty(BLOCK_BYTES, dtype=np.uint8)
        self._scratch = np.empty(BLOCK_BYTES, dtype=np.uint8)
        self._digest, self._width = xxhash.xxh3_128(), 1

    def blocks(self, job: TensorJob, *, width: int = 1) -> Iterator[np.ndarray]:
        """Yield a tensor's bytes in the stored dtype, in order; a block is valid until the next one is asked for.

        Args:
            job: The tensor.
            width: Blocks are whole rows of this number of elements.

        Raises:
            CheckpointError: The source cannot be read or has changed, its replicas differ, it is not what its manifest
                says, a value is not finite, or a dtype cannot be converted.
        """
        self._digest, self._width = xxhash.xxh3_128(), width
        if job.mapping is None:
            assert job.source is not None
            yield from self._copied(job, 0, job.source.numel)
            self._check_digest(job, self._digest.hexdigest())
            return
        rows = job.mapping.rows
        for index, block in enumerate(rows.blocks):
            if isinstance(block, Keep):
                assert job.source is not None
                yield from self._copied(job, block.start * rows.row_numel, block.stop * rows.row_numel)
            elif job.state is not None:
                # The optimizer states of a new row are zero.
                yield from self._zeros(block.rows * rows.row_numel * job.info.item_bytes)
            else:
                # New values are rounded to the source's dtype first, so that --dtype rounds what it would have kept.
                dtype = job.source.dtype if job.source is not None else job.info.dtype
                for values in job.mapping.draw(index, size=BLOCK_BYTES // 4):
                    made = cast(encode(values, dtype), dtype, job.info.dtype)
                    self._check(made, job.info.dtype, job, "among its new rows")
                    yield made
        if job.source is not None and self._expected(job) is not None:
            # Rows were left out or repeated above: the manifest's digest is of all of them, once.
            digest = xxhash.xxh3_128()
            for window in self._windows(job, 0, job.source.numel):
                digest.update(window.data)
            self._check_digest(job, digest.hexdigest())

    def _zeros(self, count: int) -> Iterator[np.ndarray]:
        self._scratch[: min(count, BLOCK_BYTES)] = 0
        for position in range(0, count, BLOCK_BYTES):
            yield self._scratch[: min(BLOCK_BYTES, count - position)]

    def source_digest(self) -> str:
        """Return the xxh3-128 digest of the source bytes of the last job, where all of them were copied in order."""
        return self._digest.hexdigest()

    def close(self) -> None:
        """Close the source's files."""
        self._reader.close()

    def _windows(self, job: TensorJob, start: int, stop: int) -> Iterator[np.ndarray]:
        """Yield elements ``start .. stop`` of a source tensor as bytes."""
        info = job.source
        assert info is not None
        source = self._source.of_state(job.state)
        pieces, replicas = source.pieces(info.name), source.replicas(info.name)
        step = _window_numel(job, pieces, self._width)
        for position in range(start, stop, step):
            window = self._buffer[: (min(position + step, stop) - position) * info.item_bytes]
            self._reader.read(pieces, info, position, window, replicas)
            yield window

    def _copied(self, job: TensorJob, start: int, stop: int) -> Iterator[np.ndarray]:
        assert job.source is not None
        for block in self._windows(job, start, stop):
            self._digest.update(block.data)
            self._check(block, job.source.dtype, job, "in the source")
            if job.info.dtype != job.source.dtype:
                try:
                    block = cast(block, job.source.dtype, job.info.dtype)
                except CheckpointError as error:
                    raise CheckpointError(f"tensor '{job.info.name}': {error}") from None
                self._check(block, job.info.dtype, job, f"once it is stored as {job.info.dtype}")
            yield block

    def _expected(self, job: TensorJob) -> str | None:
        assert job.source is not None
        return self._source.of_state(job.state).facts.digests.get(job.source.name)

    def _check_digest(self, job: TensorJob, found: str) -> None:
        """Raise unless the source's bytes are those of which the manifest has the digest, if it has one."""
        expected = self._expected(job)
        if expected is not None and expected != found:
            assert job.source is not None
            raise CheckpointError(
                f"{self._source.facts.path} is damaged: the values of tensor '{job.source.name}' are not those of its "
                f"{MANIFEST_NAME}"
            )

    def _check(self, block: np.ndarray, dtype: str, job: TensorJob, where: str) -> None:
        if not self._allow_nonfinite and has_nonfinite(block, dtype, self._scratch):
            raise CheckpointError(
                f"tensor '{job.info.name}' holds NaN or Inf {where} ({self._source.facts.path}); "
                "pass --allow-nonfinite to copy it all the same"
            )


ItemT = TypeVar("ItemT")


def _window_numel(job: TensorJob, pieces: Pieces, width: int) -> int:
    """Return the elements that are copied at once: as many rows as fit where a piece or a place has some columns only.

    Raises:
        CheckpointError: A row of such a tensor is larger than a buffer.
    """
    assert job.source is not None
    width = max(width, *(piece.width for piece in pieces if isinstance(piece, Piece)), 1)
    # The target's dtype may be the wider one.
    rows = BLOCK_BYTES // (width * max(job.source.item_bytes, job.info.item_bytes))
    if rows == 0:
        raise CheckpointError(f"tensor '{job.info.name}' has rows of {width} elements: too long to be cut by columns")
    return rows * width


def batches(
    items: Iterable[ItemT],
    size: Callable[[ItemT], int],
    *,
    most_bytes: int = BLOCK_BYTES,
    group: Callable[[ItemT], object] = lambda item: None,
) -> list[list[ItemT]]:
    """Return consecutive items in batches: in the files of ranks, small tensors lie side by side.

    Args:
        items: The items.
        size: Returns the bytes of an item.
        most_bytes: Bytes of a batch of several.
        group: Returns what the items of a batch have in common.
    """
    found: list[list[ItemT]] = []
    filled = most_bytes
    for item in items:
        is_full = not found or filled + size(item) > most_bytes or len(found[-1]) >= _MOST_OF_BATCH
        if is_full or group(found[-1][0]) != group(item):
            found.append([])
            filled = 0
        found[-1].append(item)
        filled += size(item)
    return found


_MOST_OF_BATCH = 64


class Closable(Protocol):
    """What holds open files."""

    def close(self) -> None:
        """Close them."""


ToolT = TypeVar("ToolT", bound=Closable)
ResultT = TypeVar("ResultT")


def in_threads(
    items: Iterable[ItemT],
    make_tool: Callable[[], ToolT],
    work: Callable[[ItemT, ToolT], ResultT],
    *,
    workers: int,
    stop: Callable[[], None] = lambda: None,
) -> list[ResultT]:
    """Return ``work(item, tool)`` of every item, in order.

    Args:
        items: What to work on; begun in this order.
        make_tool: Makes what a thread needs (buffers, open files); closed at the end.
        work: The work.
        workers: Threads.
        stop: Called at the end, also of a failure, before the threads are waited for: makes running work give up.

    Raises:
        Exception: The first that ``work`` raised.
    """
    local = threading.local()
    tools: list[ToolT] = []

    def run(item: ItemT) -> ResultT:
        if not hasattr(local, "tool"):
            local.tool = make_tool()
            tools.append(local.tool)
        return work(item, local.tool)

    with ThreadPoolExecutor(max_workers=workers, thread_name_prefix="tensor") as pool:
        futures = [pool.submit(run, item) for item in items]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        finally:
            stop()
            pool.shutdown(wait=True, cancel_futures=True)
            for tool in tools:
                tool.close()
    return [future.result() for future in futures]


class Counter:
    """Bytes done so far, by all threads; tells the caller of them.

    Args:
        total: Bytes in all.
        progress: Whom to tell.
        done: Bytes that were done before.
    """

    def __init__(self, total: int, progress: Progress | None, *, done: int = 0):
        self._total, self._progress, self._done = total, progress, done
        self._lock = threading.Lock()
        self._stopped = False

    def stop(self) -> None:
        """Make every thread give up at its next block."""
        self._stopped = True

    def advance(self, count: int) -> None:
        """Count bytes.

        Raises:
            StoppedError: Another thread has failed.
        """
        if self._stopped:
            raise StoppedError
        with self._lock:
            self._done += count
            if self._progress:
                self._progress(self._done, self._total)


class StoppedError(Exception):
    """Ends a thread because another one has failed."""
