"""File system calls of a save and of a resume with 256 to 4,096 ranks, simulated without tensors.

Run ``python -m benchmarks.scale_checkpoints [--ranks 256 1024 4096]``. Every rank is a thread of one process with the
product's own ``Checkpoints``, ``FileWriter``, ``CheckpointPlace`` and ``SavedFile``. Only the engine is a stand-in: its
collectives exchange values between threads, and its files hold a number in place of tensors.

Calls are counted by wrapping the functions of ``os`` and ``io`` that the code reaches the file system through, for each
rank by its thread: ``stat``, ``lstat`` and ``DirEntry.stat`` (``stat-like``), directory listings, opened files.
``fstat`` of an open file is not counted, because no directory is asked for it. ``fsync`` is counted and does nothing.
"""

from __future__ import annotations

import argparse
import builtins
import io
import os
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.growth import Row, growth_table
from statex_dist.checkpoint.formats.zero3.layout import files_of_rank, rank_file_stem
from statex_dist.checkpoint.manifest import Manifest
from statex_dist.engine.checkpoint_retention import SavePolicy
from statex_dist.engine.checkpoints import Checkpoints
from statex_dist.engine.documents import Documents
from statex_dist.engine.saved_file import SavedFile

RANKS = (256, 1024, 4096)
KINDS = ("stat-like", "listings", "opens", "fsyncs")
_STACK_BYTES = 1 << 20


class Calls:
    """Counts the file system calls of each rank's thread."""

    def __init__(self) -> None:
        self.of_rank: dict[int, Counter[str]] = {}
        self._rank = threading.local()
        self._lock = threading.Lock()

    def begin(self, rank: int) -> None:
        """Count the calls of this thread as those of a rank."""
        self._rank.number = rank

    def add(self, kind: str) -> None:
        """Count one call; threads that a rank starts are rank 0's, which alone starts any."""
        with self._lock:
            self.of_rank.setdefault(getattr(self._rank, "number", 0), Counter())[kind] += 1

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count the calls that are made inside."""
        self.of_rank.clear()
        patches = [
            mock.patch.object(os, "stat", self._counted("stat-like", os.stat)),
            mock.patch.object(os, "lstat", self._counted("stat-like", os.lstat)),
            mock.patch.object(os, "listdir", self._counted("listings", os.listdir)),
            mock.patch.object(os, "scandir", self._scandir(os.scandir)),
            mock.patch.object(os, "open", self._counted("opens", os.open)),
            mock.patch.object(io, "open", self._counted("opens", io.open)),
            mock.patch.object(builtins, "open", self._counted("opens", builtins.open)),
            mock.patch.object(os, "fsync", self._counted("fsyncs", id)),
        ]
        for patch in patches:
            patch.start()
        try:
            yield
        finally:
            for patch in patches:
                patch.stop()

    def _counted(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.add(kind)
            return function(*args, **kwargs)

        return counted

    def _scandir(self, scandir: Callable[..., Any]) -> Callable[..., Any]:
        calls = self

        class Entry:
            """An entry of a directory whose ``stat`` is counted."""

            def __init__(self, entry: os.DirEntry[str]):
                self._entry = entry

            def __getattr__(self, name: str) -> Any:
                return getattr(self._entry, name)

            def __fspath__(self) -> str:
                return self._entry.path

            def stat(self, **kwargs: Any) -> os.stat_result:
                calls.add("stat-like")
                return self._entry.stat(**kwargs)

        @contextmanager
        def counted(*args: Any) -> Iterator[Iterator[Entry]]:
            calls.add("listings")
            with scandir(*args) as entries:
                yield (Entry(entry) for entry in entries)

        return counted


class Exchange:
    """Collectives of ranks that are threads of one process."""

    def __init__(self, world_size: int):
        self._barrier = threading.Barrier(world_size)
        self._values: list[Any] = [None] * world_size

    def gather(self, rank: int, value: Any) -> list[Any]:
        """Return every rank's value."""
        self._values[rank] = value
        self._barrier.wait()
        values = list(self._values)
        self._barrier.wait()
        return values

    def broadcast(self, rank: int, value: Any) -> Any:
        """Return rank 0's value."""
        if rank == 0:
            self._values[0] = value
        self._barrier.wait()
        value = self._values[0]
        self._barrier.wait()
        return value


class _Carried:
    """States between packs, of which there are none."""

    @staticmethod
    def state_dict() -> dict[str, Any]:
        return {}

    @staticmethod
    def load_state_dict(_: Mapping[str, Any]) -> None: ...


class SimulatedEngine:
    """The part of an engine that ``Checkpoints`` uses, with files of one number each."""

    kind = "zero3"
    in_folders = True
    carried = _Carried()

    def __init__(self, rank: int, world_size: int, exchange: Exchange):
        self.rank, self.world_size, self._exchange = rank, world_size, exchange

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value."""
        return self._exchange.gather(self.rank, value)

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value."""
        return self._exchange.broadcast(self.rank, value)

    def barrier(self) -> None:
        """Wait for all ranks."""
        self._exchange.gather(self.rank, None)

    def capture(self, directory: Path, _: Mapping[str, Any]) -> list[tuple[Path, Any]]:
        """Return two files."""
        kinds = ("model", "optim")
        return [(directory / f"{rank_file_stem(self.rank, kind)}.pt", {"rank": self.rank}) for kind in kinds]

    def read(self, directory: Path, manifest: Manifest) -> list[SavedFile]:
        """Read them."""
        files = files_of_rank(directory, manifest.files, self.rank)
        return [
            SavedFile(path, manifest.files[str(path.relative_to(directory))]) for path in (files.model, files.optim)
        ]

    def load(self, _: Path, states: list[SavedFile]) -> dict[str, Any]:
        """Check that they are this rank's."""
        assert all(file.archive.content == {"rank": self.rank} for file in states)
        return {}


def simulate(world_size: int, directory: Path) -> list[Row]:
    """Save and resume once with ``world_size`` ranks, and return the calls.

    Args:
        world_size: Number of ranks.
        directory: An empty directory.
    """
    exchange, calls = Exchange(world_size), Calls()
    documents = Documents(model={"config.json": "{}"}, settings={})
    runs = [
        Checkpoints(
            SimulatedEngine(rank, world_size, exchange),  # type: ignore[arg-type]  # what Checkpoints uses of one
            directory,
            documents,
            SavePolicy(),
        )
        for rank in range(world_size)
    ]
    rows: list[Row] = []
    acts: dict[str, Callable[[Checkpoints], Any]] = {
        "save": lambda run: run.save(1, {}),
        "resume": lambda run: run.resume(),
    }
    for name, act in acts.items():
        with calls.counting():
            _on_all(runs, act, calls)
        rows += _rows(name, world_size, calls.of_rank)
    return rows


def _on_all(runs: Sequence[Checkpoints], act: Callable[[Checkpoints], Any], calls: Calls) -> None:
    """Run ``act`` of every rank in a thread of its own.

    Raises:
        BaseException: What the first rank that failed raised.
    """
    errors: list[BaseException] = []

    def work(rank: int) -> None:
        calls.begin(rank)
        try:
            act(runs[rank])
        except BaseException as error:
            errors.append(error)
            raise

    threading.stack_size(_STACK_BYTES)
    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(len(runs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def _rows(name: str, ranks: int, of_rank: Mapping[int, Counter[str]]) -> list[Row]:
    rows: list[Row] = []
    for kind in KINDS:
        counts = [of_rank.get(rank, Counter())[kind] for rank in range(ranks)]
        figures = {"all ranks": sum(counts), "rank 0": counts[0], "another rank, at most": max(counts[1:])}
        rows += [(f"{name}: {kind}, {who}", ranks, float(count), "calls") for who, count in figures.items()]
    return rows


def measure(ranks: Sequence[int] = RANKS) -> list[Row]:
    """Return the figures of several numbers of ranks."""
    rows: list[Row] = []
    for world_size in ranks:
        with tempfile.TemporaryDirectory() as directory:
            rows += simulate(world_size, Path(directory))
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Count the file system calls of checkpoints.")
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    print(growth_table(measure(parser.parse_args().ranks)))


if __name__ == "__main__":
    main()
