"""Writing the files of a target: several tensors at a time, in any layout, journaled as they reach the disk.

Workers take tensors in order. A tensor goes to one file (safetensors) or in parts to all files (ZeRO, tensor
parallelism). After every gigabyte the written bytes are flushed and entered in the journal. The worker that finishes a
file's last tensor closes the file: it fills in checksums, flushes and digests the file, gives it its final name and
enters it in the journal too.
"""

from __future__ import annotations

import threading
from collections import Counter as CountOf
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import xxhash

from checkpoints_tools.io.gathered_writes import GatheredWrites, write_block
from checkpoints_tools.io.journal import ForwardedJournal, TargetJournal, WrittenTensor
from checkpoints_tools.io.target_file import FileRuns, OpenFile, TargetFile
from checkpoints_tools.io.tensor_stream import Counter, TensorJob, TensorStream, batches, in_threads
from checkpoints_tools.io.worker_processes import Send, cut_evenly, default_processes, in_processes, throttled
from statex_dist.checkpoint.formats.piece_io import SourceCrcs, SourceRuns
from statex_dist.checkpoint.formats.raw_io import BLOCK_BYTES, Descriptors, OpenFileShares
from statex_dist.checkpoint.formats.tensor_io import Piece, Progress, TensorSource, total_bytes
from statex_dist.errors import ConfigError
from statex_dist.work_part import WorkPart

DEFAULT_SHARD_SIZE = 5 * 10**9

DEFAULT_WORKERS = 4
"""Threads: more than the cores of a small machine, because each of them also waits for the disk."""

SYNC_BYTES = 1 << 30
"""Bytes of tensors that a killed run has to write again, at most (per worker the one that it was at besides)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WriteOptions:
    """Options of writing a directory.

    Attributes:
        max_shard_size: Bytes of values per safetensors file.
        overwrite: Whether a target that is not empty is replaced.
        workers: Tensors read, made and written at a time by each process; each needs a few buffers.
        processes: Processes that share the work; None for a number by cores and size of the job.
        part: The share of the target that is written here; None for all of it.
        resume: Whether to continue the files that a killed process left.
        allow_nonfinite: Whether NaN and Inf are copied.
    """

    max_shard_size: int = DEFAULT_SHARD_SIZE
    overwrite: bool = False
    workers: int = DEFAULT_WORKERS
    processes: int | None = None
    part: WorkPart | None = None
    resume: bool = False
    allow_nonfinite: bool = False

    def __post_init__(self) -> None:
        numbers = {"--workers": self.workers, "--max-shard-size": self.max_shard_size, "--processes": self.processes}
        for option, value in numbers.items():
            if option == "--processes" and value is None:
                continue
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{option} must be a whole number from 1, not {value!r}")


Places = Callable[[TensorJob], Sequence[Piece]]
"""Returns where a tensor goes: pieces with paths relative to the target, repeated where files hold the same values."""


def write_files(
    journal: TargetJournal,
    source: TensorSource,
    files: Sequence[TargetFile],
    jobs: Sequence[TensorJob],
    places: Places,
    options: WriteOptions,
    *,
    files_of: Mapping[str, frozenset[str]],
    crcs: SourceCrcs,
    open_files: OpenFileShares,
    progress: Progress | None,
    share: Sequence[TensorJob] | None = None,
    prepared: Collection[str] = (),
) -> Written:
    """Write every file that the journal does not have; the first failure stops all workers.

    Args:
        journal: Where finished tensors and files are entered; its directory receives the files.
        source: Where kept values come from.
        files: The files.
        jobs: Every tensor.
        places: Where each of them goes.
        options: How to write.
        files_of: The names of the files of every tensor (:func:`files_of_tensors`).
        crcs: The checksums of the source's files.
        open_files: How many files may be kept open.
        progress: Told of the bytes written.
        share: The tensors that are written here; None for all.
        prepared: Names of the files into which others write too: they are there, and are not completed.

    Raises:
        CheckpointError: The source fails, or a worker process was killed.
        OSError: The disk refuses.
    """
    share = jobs if share is None else share
    left = [job for job in share if job.key not in journal.tensors]
    total = total_bytes(job.info for job in share)
    writer = _Writer(
        *(journal, files, jobs, places, files_of, Descriptors(open_files.writer)),
        counter=Counter(total, progress, done=total - total_bytes(job.info for job in left)),
        prepared=prepared,
    )

    def own_file(job: TensorJob) -> frozenset[str] | None:
        return files_of[job.key] if len(files_of[job.key]) == 1 else None  # a file is completed as soon as it can be

    def write(share: Sequence[TensorJob]) -> None:
        in_threads(
            batches(share, lambda job: job.info.nbytes, most_bytes=min(BLOCK_BYTES, SYNC_BYTES), group=own_file),
            lambda: TensorStream(
                source, allow_nonfinite=options.allow_nonfinite, crcs=crcs, most_files=open_files.reader
            ),
            writer.write,
            workers=options.workers,
            stop=writer.counter.stop,
        )

    processes = min(options.processes or _worth(source, left, files), max(len(left), 1))
    try:
        writer.are_made(prepared, count=True)
        writer.finish_resumed()  # before any worker: who finishes a file is then the one who wrote its last tensor
        if processes == 1:
            write(left)
        else:
            _write_in_processes(writer, left, crcs, write, processes)
        writer.sync()
    finally:
        writer.close()
    return Written(processes=processes, runs=writer.runs())


def make_files(
    journal: TargetJournal, files: Sequence[TargetFile], options: WriteOptions, open_files: OpenFileShares
) -> None:
    """Make files, headers written and all their space reserved, durably: several machines will write into them."""
    descriptors = Descriptors(open_files.writer)

    def make(share: Sequence[TargetFile], _: Send) -> None:
        for layout in share:
            file = OpenFile(layout, journal, descriptors)
            file.make()
            file.sync()
            file.close()

    processes = options.processes or default_processes(0, _PIECES_OF_FILE * len(files))
    in_processes([share for share in cut_evenly(files, [0] * len(files), processes) if share], make)


_PIECES_OF_FILE = 500
"""How many pieces take the time of laying a file out, about."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """Result of writing files.

    Attributes:
        processes: Number of processes that the job was worth.
        runs: Checksums of the bytes in the files that are not complete.
    """

    processes: int
    runs: Mapping[str, FileRuns]


def _worth(source: TensorSource, jobs: Sequence[TensorJob], files: Sequence[TargetFile]) -> int:
    """Return how many processes the jobs are worth."""
    return default_processes(total_bytes(job.info for job in jobs), len(jobs) * (len(source.files) + len(files)))


def _write_in_processes(
    writer: _Writer,
    jobs: Sequence[TensorJob],
    crcs: SourceCrcs,
    write: Callable[[Sequence[TensorJob]], None],
    processes: int,
) -> None:
    """Write jobs in several processes: files of several shares are made before, and completed after the tensors.

    A worker process has the files that only its own share has tensors for; the checksums of its bytes in other files
    come back, with those of the bytes that it read.
    """
    shares = [share for share in cut_evenly(jobs, [job.info.nbytes for job in jobs], processes) if share]

    def of_files(names: Sequence[str]) -> list[list[str]]:
        return [share for share in cut_evenly(names, [0] * len(names), processes) if share]

    def make(names: Sequence[str], _: Send) -> dict[str, FileRuns]:
        return writer.make(names)

    def write_share(share: Sequence[TensorJob], send: Send) -> tuple[dict[str, FileRuns], SourceRuns]:
        writer.become_worker(share, send)
        crcs.forget()
        write(share)
        writer.sync()
        return writer.runs(), crcs.runs()

    def finish(names: Sequence[str], send: Send) -> None:
        writer.become_worker((), send)
        writer.finish(names)

    common = [name for name in writer.files_of_several(shares) if name not in writer.prepared]
    for runs in in_processes(of_files(common), make):
        writer.add_runs(runs)
    writer.are_made(common)
    for runs, source_runs in in_processes(shares, write_share, receive=writer.receive):
        writer.add_runs(runs)
        crcs.add_runs(source_runs)
    in_processes(of_files(common), finish, receive=writer.receive)


def finish_crcs(crcs: SourceCrcs, processes: int, *, everything: bool = False, part: WorkPart | None = None) -> int:
    """Check the storages of a source in several processes, and return their number.

    Args:
        crcs: What has been read of the source.
        processes: Number of processes.
        everything: Whether to check the storages of which nothing was read, too.
        part: The share of them that is checked; None for all.

    Raises:
        CheckpointError: A storage is not what was written.
    """
    first, count = (0, 1) if part is None else (part.index - 1, part.count)
    if processes == 1:
        return crcs.finish(everything=everything, rank=first, world_size=count)

    def check(index: int, _: Send) -> int:
        rank = first + index * count
        return crcs.finish(everything=everything, rank=rank, world_size=count * processes)

    return sum(in_processes(range(processes), check))


def files_of_tensors(jobs: Iterable[TensorJob], places: Places) -> dict[str, frozenset[str]]:
    """Return the names of the files of every tensor, by its key; equal sets are one object."""
    sets: dict[frozenset[str], frozenset[str]] = {}
    result = {}
    for job in jobs:
        names = frozenset(str(place.path) for place in places(job))
        result[job.key] = sets.setdefault(names, names)
    return result


class _Writer:
    """The files of a target while tensors are written into them, by any number of workers."""

    def __init__(
        self,
        journal: TargetJournal,
        files: Sequence[TargetFile],
        jobs: Sequence[TensorJob],
        places: Places,
        files_of: Mapping[str, frozenset[str]],
        descriptors: Descriptors,
        *,
        counter: Counter,
        prepared: Collection[str],
    ):
        self._journal: TargetJournal | ForwardedJournal = journal
        self._places = places
        self._lock = threading.Lock()
        self._pending: dict[str, WrittenTensor] = {}
        self._pending_bytes = 0
        self.counter, self.prepared = counter, prepared
        unfinished = [file for file in files if file.name not in journal.files]
        self._open = {file.name: OpenFile(file, journal, descriptors) for file in unfinished}
        self._files_of = files_of
        for job in jobs:
            for place in places(job):
                if (file := self._open.get(str(place.path))) is not None:
                    file.expect(job, place)
            for name in self._files_of[job.key]:
                if name in self._open and job.key not in journal.tensors:
                    self._open[name].await_tensor()

    def write(self, jobs: Sequence[TensorJob], stream: TensorStream) -> None:
        """Write tensors to all their places, and complete the files of which they were the last."""
        gathered = GatheredWrites(self._open)
        written = {job.key: self._write_tensor(job, stream, gathered) for job in jobs}
        gathered.flush()
        with self._lock:
            self._pending |= written
            self._pending_bytes += total_bytes(job.info for job in jobs)
            due = self._pending_bytes >= SYNC_BYTES
            if due:
                self._pending_bytes = 0
        if due:
            self.sync()
        counts: CountOf[frozenset[str]] = CountOf(self._files_of[job.key] for job in jobs)
        for names, count in counts.items():
            for name in names:
                if self._open[name].done_with_tensors(count):
                    self._finish(self._open[name])

    def _write_tensor(self, job: TensorJob, stream: TensorStream, gathered: GatheredWrites) -> WrittenTensor:
        """Write a tensor to all its places, and return its digests."""
        # The stream already knows the digest of values that are copied without a change.
        copied = job.mapping is None and job.source is not None and job.source.dtype == job.info.dtype
        digest = None if copied else xxhash.xxh3_128()
        item, position = job.info.item_bytes, 0
        places = self._places(job)
        width = max((place.width for place in places), default=1)
        for block in stream.blocks(job, width=width):
            write_block(gathered, places, item, position, block)
            if digest is not None:
                digest.update(block.data)
            position += len(block) // item
            self.counter.advance(len(block))
        assert position == job.info.numel, f"{job.info}: {position} elements"
        source = stream.source_digest() if job.mapping is None else None
        stored = digest.hexdigest() if digest is not None else stream.source_digest()
        return WrittenTensor(xxh3_128=stored, source_xxh3_128=source)

    def files_of_several(self, shares: Sequence[Sequence[TensorJob]]) -> list[str]:
        """Return the unfinished files that lack tensors of more than one share."""
        seen: dict[str, int] = {}
        several: dict[str, None] = {}
        for number, share in enumerate(shares):
            for names in {id(names): names for job in share if (names := self._files_of[job.key])}.values():
                several |= {name: None for name in names if seen.setdefault(name, number) != number}
        return [name for name in self._open if name in several]

    def make(self, names: Iterable[str]) -> dict[str, FileRuns]:
        """Make files, and return the checksums of an earlier run's bytes in them."""
        for name in names:
            self._open[name].make()
        return {name: runs for name in names if (runs := self._open[name].runs())}

    def are_made(self, names: Iterable[str], *, count: bool = False) -> None:
        """Take files as they lie there; ``count`` as of :meth:`OpenFile.is_made_elsewhere`."""
        for name in names:
            self._open[name].is_made_elsewhere(count=count)

    def become_worker(self, share: Sequence[TensorJob], send: Send) -> None:
        """Have what comes of this copy of the process sent to its parent, for :meth:`receive`."""
        self._journal = ForwardedJournal(self._journal, lambda *entry: send(("entry", entry)))
        total = total_bytes(job.info for job in share)
        self.counter = Counter(total, throttled(lambda count: send(("bytes", count))))
        if share:
            for file in self._open.values():
                file.forget()

    def receive(self, message: tuple[str, Any]) -> None:
        """Enter what a worker process has sent."""
        kind, value = message
        if kind == "bytes":
            self.counter.advance(value)
        else:
            self._journal.add(*value)

    def runs(self) -> dict[str, FileRuns]:
        """Return the checksums of the bytes in the unfinished files."""
        unfinished = (item for item in self._open.items() if item[0] not in self._journal.files)
        return {name: runs for name, file in unfinished if (runs := file.runs())}

    def add_runs(self, found: Mapping[str, FileRuns]) -> None:
        """Note what worker processes have written (:meth:`runs`)."""
        for name, runs in found.items():
            self._open[name].add_runs(runs)

    def finish(self, names: Iterable[str]) -> None:
        """Complete files of which no tensor is missing."""
        for name in names:
            self._finish(self._open[name])

    def finish_resumed(self) -> None:
        """Complete the files of which no tensor is missing: an earlier run was stopped there, or they hold none."""
        self.finish(name for name, file in self._open.items() if not file.lacks_tensors and name not in self.prepared)

    def _finish(self, file: OpenFile) -> None:
        name = file.layout.name
        with self._lock:
            mine = {key: tensor for key, tensor in self._pending.items() if name in self._files_of[key]}
            alone = all(self._files_of[key] == {name} for key in mine)
        if mine and not alone:
            # They lie in other files too: those must be on disk before this one counts as finished.
            self.sync()
            mine = {}
        record = file.finish()
        self._journal.add(mine, name, record)
        with self._lock:
            self._pending = {key: tensor for key, tensor in self._pending.items() if key not in mine}

    def sync(self) -> None:
        """Bring what has been written to disk, and enter it in the journal."""
        with self._lock:
            pending = dict(self._pending)
        for file in [*self._open.values()]:
            file.sync()
        self._journal.add(pending)
        with self._lock:
            self._pending = {key: tensor for key, tensor in self._pending.items() if key not in pending}

    def close(self) -> None:
        """Close all files, finished or not."""
        for file in self._open.values():
            file.close()


def finish_files(
    journal: TargetJournal,
    files: Sequence[TargetFile],
    jobs: Sequence[TensorJob],
    places: Places,
    options: WriteOptions,
    *,
    files_of: Mapping[str, frozenset[str]],
    runs: Iterable[Mapping[str, FileRuns]],
    open_files: OpenFileShares,
) -> int:
    """Complete the files of which all tensors are written, by other processes, and return how many processes did it.

    Args:
        journal: It has all tensors; finished files are entered.
        files: The files.
        jobs: Every tensor.
        places: Where each of them goes.
        options: How to write.
        files_of: The names of the files of every tensor.
        runs: Checksums of what each of those processes wrote.
        open_files: How many files may be kept open.
    """
    for file in files:
        final = journal.directory / file.name
        if file.name not in journal.files and final.is_file() and final.stat().st_size == file.size:
            journal.add({}, file.name, file.record(final))  # the process was killed before it could write that down
    left = [file.name for file in files if file.name not in journal.files]
    counter = Counter(0, None)
    writer = _Writer(
        *(journal, files, jobs, places, files_of, Descriptors(open_files.writer)), counter=counter, prepared=()
    )
    writer.are_made(left)
    for of_part in runs:
        writer.add_runs({name: found for name, found in of_part.items() if name in left})
    processes = options.processes or default_processes(0, _PIECES_OF_FILE * len(left))

    def finish(names: Sequence[str], send: Send) -> None:
        writer.become_worker((), send)
        writer.finish(names)

    shares = [share for share in cut_evenly(left, [0] * len(left), processes) if share]
    in_processes(shares, finish, receive=writer.receive)
    return processes
