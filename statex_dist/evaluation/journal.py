"""Evaluations that survive being killed and can be shared by several processes.

An evaluation is a list of *units*, none of which depends on another: a few prompts, a few documents. What a unit finds
is appended to a journal, one line a unit, and flushed to disk before the next one begins. Started again, the same
evaluation skips what its journal holds. With several ranks, unit ``i`` belongs to rank ``i % world_size``, and each
rank writes a part file of its own; rank 0 puts the parts together in the order of the units. So the result is the
same, bit for bit, however often it was interrupted and however many ranks shared it::

    OUT/SUITE.unfinished/settings.json    what is evaluated, and how
    OUT/SUITE.unfinished/part-RANK.jsonl  {"unit": ..., "seconds": ..., "records": [...]}
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import xxhash

from statex_dist.checkpoint.formats.detect import open_files
from statex_dist.checkpoint.formats.tensor_io import Piece, TensorSource
from statex_dist.checkpoint.json_file import parse_json, read_json
from statex_dist.checkpoint.layout import CONFIG_NAME
from statex_dist.durable.files import JournalDamageError, JsonlJournal, read_journal, sync, write_json
from statex_dist.durable.lock import LockHeldError, acquire
from statex_dist.durable.progress import ProgressLine
from statex_dist.errors import ConfigError, DataError, reason
from statex_dist.evaluation.ranks import EvalRanks
from statex_dist.evaluation.report import open_target

Record = dict[str, Any]
"""Facts of one sample: JSON-able, without NaN."""

_SETTINGS = "settings.json"
_SAMPLED_BYTES = 64 << 20
_SAMPLES, _SAMPLE_BYTES, _TENSOR_BYTES = 256, 256 << 10, 16 << 10


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalUnit:
    """A piece of an evaluation.

    Attributes:
        key: Its name, unlike that of any other unit.
        run: Does it, and returns its records. They depend on nothing but the model, the settings and ``key``.
        tokens: Tokens that it reads, for the progress line.
    """

    key: str
    run: Callable[[], list[Record]]
    tokens: int = 0


class UnitJournal:
    """The finished units of an evaluation; a context manager that all ranks open.

    Args:
        directory: The result directory, made if it is missing; all ranks must see the same one.
        suite: Name of the suite.
        fingerprint: Everything that the result depends on, JSON-able: settings, model, data.
        ranks: This process among the others.
        overwrite: Whether results in the directory are replaced, and a journal of other settings is dropped.

    Attributes:
        found: Number of units that an earlier, interrupted evaluation has done.
        seconds: Seconds that all units took, earlier ones included; known on rank 0 after :func:`work`.

    Raises:
        ConfigError: The directory holds results or an unfinished evaluation with other settings, or another process
            is evaluating into it.
        DataError: The journal is damaged.
    """

    def __init__(
        self,
        directory: Path,
        suite: str,
        fingerprint: Mapping[str, Any],
        *,
        ranks: EvalRanks | None = None,
        overwrite: bool = False,
    ):
        self.ranks = ranks or EvalRanks()
        self.path = directory / f"{suite}.unfinished"
        self.seconds = 0.0
        self._part: JsonlJournal | None = None
        wanted = json.loads(json.dumps(fingerprint, sort_keys=True, allow_nan=False))
        with self.ranks.together():
            if self.ranks.rank == 0:
                _open_directory(directory, suite, wanted, overwrite=overwrite)
        with self.ranks.together():
            done = self.read()
            with _refuse_held(directory):
                self._part = JsonlJournal(self.path / f"part-{self.ranks.rank}.jsonl", exclusive=True)
        # Nothing is written before every rank has read, so that all of them have found the same.
        self._done = set(done)
        self.found = len(done)

    def __enter__(self) -> UnitJournal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let other processes have this rank's part; what it holds stays."""
        if self._part is not None:
            self._part.close()
            self._part = None

    def is_done(self, key: str) -> bool:
        """Return whether an earlier evaluation, or this rank, has done a unit."""
        return key in self._done

    def add(self, key: str, records: list[Record], *, seconds: float) -> None:
        """Write down durably what a unit found."""
        assert self._part is not None, "the journal is closed"
        self._part.append({"unit": key, "seconds": round(seconds, 6), "records": records})
        self._done.add(key)

    def read(self) -> dict[str, dict[str, Any]]:
        """Return the lines of all parts by unit; a last line that was cut by the end of its process is left out.

        Raises:
            DataError: A line is damaged.
        """

        def parse(text: bytes) -> tuple[str, dict[str, Any]]:
            line = parse_json(text)
            return line["unit"], line

        lines: dict[str, dict[str, Any]] = {}
        try:
            for part in sorted(self.path.glob("part-*.jsonl")):
                lines.update(read_journal(part, parse))
        except JournalDamageError as error:
            raise DataError(
                f"{error.path}, line {error.line} is damaged ({reason(error.cause)}); delete {self.path} to start the "
                "evaluation anew"
            ) from None
        return lines

    def finish(self) -> None:
        """Remove the journal; the results that were made of it are written."""
        self.close()
        if self.ranks.rank == 0:
            shutil.rmtree(self.path)
            sync(self.path.parent)


@contextmanager
def _refuse_held(directory: Path) -> Iterator[None]:
    """Say that another process evaluates into a directory, where it holds a part."""
    try:
        yield
    except LockHeldError:
        raise ConfigError(
            f"another process is evaluating into {directory}; wait for it, or give another --out"
        ) from None


def _remove_journal(journal: Path) -> None:
    """Remove a journal that no process is writing; if one is, raise and remove nothing."""
    with ExitStack() as parts, _refuse_held(journal.parent):
        for path in sorted({journal / "part-0.jsonl", *journal.glob("part-*.jsonl")}):
            parts.enter_context(acquire(path, required=False))
        shutil.rmtree(journal)


def _open_directory(directory: Path, suite: str, wanted: dict[str, Any], *, overwrite: bool) -> None:
    """Make the result directory and its journal, or find the journal of the same evaluation there."""
    journal, results = directory / f"{suite}.unfinished", directory / f"{suite}.json"
    if results.exists() and overwrite:
        if journal.exists():  # killed after the results were written
            _remove_journal(journal)
        _remove_results(directory, suite)
    elif results.exists():
        raise ConfigError(f"--out {directory} holds the results of {suite}; pass --overwrite to replace them")
    if (journal / _SETTINGS).is_file():
        different = _first_difference(_read_settings(journal / _SETTINGS), wanted)
        if different is None:
            return
        if not overwrite:
            name, old, new = different
            raise ConfigError(
                f"--out {directory} holds an unfinished evaluation with {name} {old}, this one has {new}; "
                "give the same to go on, another --out, or --overwrite to start anew"
            )
    if journal.exists():
        _remove_journal(journal)
    open_target(directory, overwrite=overwrite)
    journal.mkdir()
    write_json(journal / _SETTINGS, wanted, ensure_ascii=False)


def _remove_results(directory: Path, suite: str) -> None:
    """Remove what a finished evaluation wrote, its summary last: a later one may have other plots."""
    results = directory / f"{suite}.json"
    try:
        plots = read_json(results)["plots"]
    except (OSError, ValueError, KeyError, TypeError):
        plots = []  # damaged, or by an earlier version: its plots stay
    for name in plots:
        if isinstance(name, str) and Path(name).name == name and name.endswith(".png"):
            (directory / name).unlink(missing_ok=True)
    (directory / f"{suite}.jsonl").unlink(missing_ok=True)
    results.unlink()


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = read_json(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); delete {path.parent} to start the evaluation anew") from None
    return settings if isinstance(settings, dict) else {}


def _first_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """Return the dotted name of the first setting that differs, with both values as JSON."""
    a, b = dict(_leaves(old)), dict(_leaves(new))
    for name in dict.fromkeys((*b, *a)):
        if name not in a or name not in b or a[name] != b[name]:
            was, now = ("none" if name not in side else json.dumps(side[name]) for side in (a, b))
            return name, was, now
    return None


def _leaves(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, values


def work(units: Iterable[EvalUnit], journal: UnitJournal | None = None, *, title: str = "") -> list[Record] | None:
    """Do this rank's units that are not done, and put together what all ranks found.

    Args:
        units: All units of the evaluation, in an order that every rank and every start agrees on.
        journal: Where they are written down; None does everything here, in memory.
        title: What the progress line calls it.

    Returns:
        All records in the order of the units on rank 0; None on other ranks.

    Raises:
        StateXError: Another rank has failed.
    """
    if journal is None:
        return [record for unit in units for record in unit.run()]
    ranks = journal.ranks
    keys: list[str] = []
    with _progress(units, journal, title) as advance:
        for i, unit in enumerate(units):
            keys.append(unit.key)
            if ranks.owns(i) and not journal.is_done(unit.key):
                begin = time.monotonic()
                records = unit.run()
                journal.add(unit.key, records, seconds=time.monotonic() - begin)
                advance(unit.tokens)
    assert len(set(keys)) == len(keys), "two units share a key"
    with ranks.together():
        pass
    if ranks.rank != 0:
        return None
    lines = journal.read()
    journal.seconds = sum(lines[key]["seconds"] for key in keys)
    return [record for key in keys for record in lines[key]["records"]]


@contextmanager
def _progress(units: Iterable[EvalUnit], journal: UnitJournal, title: str) -> Iterator[Callable[[int], None]]:
    """Yield what to call with the tokens of each unit done: a bar where the number of units is known, else lines."""
    if journal.ranks.rank != 0:
        yield lambda tokens: None
        return
    total, found = None, 0
    if isinstance(units, Sequence):
        mine = [unit for i, unit in enumerate(units) if journal.ranks.owns(i)]
        total, found = len(mine), sum(journal.is_done(unit.key) for unit in mine)
    with ProgressLine(title, total, "units", done=found) as progress:
        yield lambda tokens: progress.advance(1, tokens)


def model_fingerprint(directory: Path) -> str:
    """Return a digest that tells a model from another: of its config, and of its weights' names, sizes and contents.

    Of a weight file beyond 64 MiB three pieces of every tensor are read, its beginning, middle and end (a training step
    changes some tensors only where others are frozen), and 256 pieces evenly spaced over the file.

    Args:
        directory: Model directory, or a checkpoint of any layout.
    """
    digest = xxhash.xxh3_128()
    source = open_files(directory, digests=False)
    assert source.facts.model_dir is not None, "it was loaded"
    places = _tensors(source)
    for path in sorted({source.facts.model_dir / CONFIG_NAME, *source.files}):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            if size <= _SAMPLED_BYTES:
                digest.update(file.read())
                continue
            starts = [i * (size - _SAMPLE_BYTES) // (_SAMPLES - 1) for i in range(_SAMPLES)]
            for first, end in places.get(path, []):
                last = max(first, end - _TENSOR_BYTES)
                starts += [first, (first + last) // 2, last]
            for i, place in enumerate(starts):
                file.seek(place)
                digest.update(file.read(_SAMPLE_BYTES if i < _SAMPLES else _TENSOR_BYTES))
    return digest.hexdigest()


def _tensors(source: TensorSource) -> dict[Path, list[tuple[int, int]]]:
    """Return where in each weight file the bytes of tensors begin and end, by the tensors' names."""
    found: dict[Path, list[tuple[int, int]]] = {}
    for name in sorted(source.owned()):
        item = source.info(name).item_bytes
        for piece in source.pieces(name):
            if isinstance(piece, Piece):
                found.setdefault(piece.path, []).append((piece.offset, piece.offset + piece.numel * item))
    return found
