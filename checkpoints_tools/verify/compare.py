"""Comparing tensors of a checkpoint with their expected values, several at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import xxhash

from checkpoints_tools.io.target_writer import finish_crcs
from checkpoints_tools.io.tensor_stream import Counter, TensorJob, TensorStream, batches, in_threads
from checkpoints_tools.io.worker_processes import (
    Send,
    cut_evenly,
    default_processes,
    in_processes,
    share_of,
    throttled,
)
from statex_dist.checkpoint.dtypes import CONVERTIBLE, TORCH_NAMES, cast
from statex_dist.checkpoint.formats.piece_io import PieceReader, SourceCrcs, SourceRuns
from statex_dist.checkpoint.formats.raw_io import share_open_files
from statex_dist.checkpoint.formats.tensor_io import Piece, Progress, TensorInfo, TensorSource
from statex_dist.checkpoint.layout import MANIFEST_NAME
from statex_dist.work_part import WorkPart


@dataclass(frozen=True, slots=True)
class Pair:
    """A tensor as it should be, and the name under which the other checkpoint has it (in its ``job.state``)."""

    job: TensorJob
    found: str

    @property
    def kind(self) -> str:
        """The change that the tensor's job makes, ``kept`` for none."""
        return self.job.mapping.rows.change if self.job.mapping else "kept"


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result of a comparison: the difference in words, if any, and the digest of the other's stored bytes."""

    pair: Pair
    problem: str | None
    digest: str | None


def compare(
    pairs: Sequence[Pair],
    source: TensorSource,
    other: TensorSource,
    *,
    workers: int,
    processes: int | None = 1,
    part: WorkPart | None = None,
    rtol: float | None = None,
    progress: Progress | None = None,
) -> list[Outcome]:
    """Compare tensors of ``other`` with the results of the pairs' jobs on ``source``.

    Args:
        pairs: The tensors to compare.
        source: The checkpoint from which the jobs take their values.
        other: The checkpoint that is compared with the jobs' results.
        workers: Tensors compared at a time by each process.
        processes: Processes that share the work; None for a number by cores and size of the job.
        part: The share of the tensors, and of the checksums of files, that is compared; None for all.
        rtol: Largest relative difference of a value, dtypes aside; None asks for the same dtype and the same bytes.
        progress: Told of the bytes compared.

    Raises:
        CheckpointError: One of the two is damaged: a checksum, a digest or a replica disagrees.
    """
    first, second = _Side(source), _Side(other)
    if part is not None:  # a storage is checked by one part, whichever part's tensors lie in it
        for pair in pairs:
            first.crcs.expect(source.of_state(pair.job.state).pieces(pair.job.info.name))
            second.crcs.expect(other.of_state(pair.job.state).pieces(pair.found))
        pairs = share_of(pairs, [pair.job.info.nbytes for pair in pairs], part)
    most_files = share_open_files(0, threads=workers, readers=3).reader
    sizes = [_info(other, pair).nbytes for pair in pairs]
    counter = Counter(sum(sizes), progress)
    files = len(source.files) + len(other.files)
    processes = min(processes or default_processes(2 * sum(sizes), len(pairs) * files), max(len(pairs), 1))

    def run(batch: Sequence[Pair], comparer: _Comparer) -> list[Outcome]:
        found = []
        for pair in batch:
            found.append(comparer.compare(pair))
            counter.advance(_info(other, pair).nbytes)
        return found

    def in_worker(share: Sequence[Pair], send: Send) -> tuple[list[_Finding], SourceRuns, SourceRuns]:
        nonlocal counter
        first.crcs.forget()
        second.crcs.forget()
        counter = Counter(sum(_info(other, pair).nbytes for pair in share), throttled(send))
        found = [(outcome.problem, outcome.digest) for outcome in run_all(share)]
        return found, first.crcs.runs(), second.crcs.runs()

    def run_all(share: Sequence[Pair]) -> list[Outcome]:
        found = in_threads(
            batches(share, lambda pair: pair.job.info.nbytes),
            lambda: _Comparer(first, second, rtol, most_files),
            run,
            workers=workers,
            stop=counter.stop,
        )
        return [outcome for of_batch in found for outcome in of_batch]

    if processes == 1:
        outcomes = run_all(pairs)
    else:
        findings: list[_Finding] = []
        for found, *runs in in_processes(cut_evenly(pairs, sizes, processes), in_worker, receive=counter.advance):
            findings += found
            for side, of_side in zip((first, second), runs, strict=True):
                side.crcs.add_runs(of_side)
        outcomes = [Outcome(pair, *finding) for pair, finding in zip(pairs, findings, strict=True)]
    for side in (first, second):
        finish_crcs(side.crcs, processes, part=part)
    return outcomes


_Finding = tuple[str | None, str | None]
"""The difference in words, if any, and the digest, of an :class:`Outcome`."""


def _info(source: TensorSource, pair: Pair) -> TensorInfo:
    """Return a tensor of the other checkpoint as it would be exported."""
    of_state = source.of_state(pair.job.state)
    return replace(of_state.info(pair.found), dtype=of_state.natural_dtype(pair.found))


class _Side:
    """One of the two checkpoints, with the checksums of its files."""

    def __init__(self, source: TensorSource):
        self.source = source
        self.crcs = SourceCrcs(source.archives())


class _Comparer:
    """Compares one pair after the other, in buffers of its own."""

    def __init__(self, first: _Side, second: _Side, rtol: float | None, most_files: int):
        self._stream = TensorStream(first.source, allow_nonfinite=True, crcs=first.crcs, most_files=most_files)
        self._other = TensorStream(second.source, allow_nonfinite=True, crcs=second.crcs, most_files=most_files)
        self._reader = PieceReader(second.source.opened, second.crcs, second.source.ahead, most_files=most_files)
        self._second, self._rtol = second.source, rtol

    def compare(self, pair: Pair) -> Outcome:
        """Return what differs in one tensor, if anything."""
        expected, found = pair.job.info, _info(self._second, pair)
        if found.shape != expected.shape:
            return Outcome(pair, f"has shape {found.shape}, not {expected.shape}", None)
        mixed = found.dtype != expected.dtype
        if mixed and (self._rtol is None or not {found.dtype, expected.dtype} <= set(CONVERTIBLE)):
            return Outcome(pair, f"has dtype {TORCH_NAMES[found.dtype]}, not {TORCH_NAMES[expected.dtype]}", None)
        of_state = self._second.of_state(pair.job.state)
        stored, pieces = of_state.info(pair.found), of_state.pieces(pair.found)
        # Both sides in windows of one size, whichever has the wider elements or the longer rows.
        width = max((p.width for p in pieces if isinstance(p, Piece)), default=1)
        digest, problem = xxhash.xxh3_128(), None
        row = max(found.numel // found.shape[0], 1) if found.shape and found.shape[0] else 1
        element = 0
        for block in self._stream.blocks(pair.job, width=width):
            count = len(block) // expected.item_bytes
            actual = np.empty(count * stored.item_bytes, dtype=np.uint8)
            self._reader.read(pieces, stored, element, actual)
            digest.update(actual.data)
            if problem is None:
                wrong = _differing(block, cast(actual, stored.dtype, found.dtype), expected, found, self._rtol)
                if wrong.any():
                    problem = f"differs from row {(element + int(wrong.argmax())) // row} on"
            element += count
        if of_state.replicas(pair.found):
            for _ in self._other.blocks(TensorJob.copy(stored, state=pair.job.state)):
                pass  # reading compares the copies
        recorded = of_state.facts.digests.get(pair.found)
        if problem is None and recorded is not None and recorded != digest.hexdigest():
            problem = f"is not the one whose digest is in {of_state.facts.path / MANIFEST_NAME}"
        return Outcome(pair, problem, digest.hexdigest())

    def close(self) -> None:
        """Close all files."""
        self._stream.close()
        self._other.close()
        self._reader.close()


def _differing(
    block: np.ndarray, actual: np.ndarray, expected: TensorInfo, found: TensorInfo, rtol: float | None
) -> np.ndarray:
    """Return, per element of two blocks, whether it differs."""
    if rtol is None or expected.dtype not in CONVERTIBLE:
        return (block.reshape(-1, expected.item_bytes) != actual.reshape(-1, found.item_bytes)).any(axis=1)
    a, b = (cast(x, info.dtype, "F64").view("<f8") for x, info in ((block, expected), (actual, found)))
    return ~np.isclose(a, b, rtol=rtol, atol=0, equal_nan=True)


def read_all(
    jobs: Sequence[TensorJob],
    source: TensorSource,
    crcs: SourceCrcs,
    *,
    workers: int,
    processes: int,
    progress: Progress | None,
) -> None:
    """Read tensors, with every check that reading makes.

    Args:
        jobs: The tensors.
        source: Where they are.
        crcs: The checksums of its files; reads are noted there.
        workers: Tensors read at a time by each process.
        processes: Processes that share the work.
        progress: Told of the bytes read.

    Raises:
        CheckpointError: A replica, a digest of the manifest or a file is not what it should be.
    """
    counter = Counter(sum(job.info.nbytes for job in jobs), progress)
    most_files = share_open_files(0, threads=workers, readers=1).reader

    def run(batch: Sequence[TensorJob], stream: TensorStream) -> None:
        for job in batch:
            for block in stream.blocks(job):
                counter.advance(len(block))

    def run_all(share: Sequence[TensorJob]) -> None:
        in_threads(
            batches(share, lambda job: job.info.nbytes),
            lambda: TensorStream(source, allow_nonfinite=True, crcs=crcs, most_files=most_files),
            run,
            workers=workers,
            stop=counter.stop,
        )

    def in_worker(share: Sequence[TensorJob], send: Send) -> SourceRuns:
        nonlocal counter
        crcs.forget()
        counter = Counter(sum(job.info.nbytes for job in share), throttled(send))
        run_all(share)
        return crcs.runs()

    if processes == 1:
        run_all(jobs)
        return
    for runs in in_processes(
        cut_evenly(jobs, [job.info.nbytes for job in jobs], processes), in_worker, receive=counter.advance
    ):
        crcs.add_runs(runs)
