"""From files on disk to documents: text files, JSON lines and parquet, found, split into work units and read.

A unit is small enough to balance workers and large enough to hide what a task costs; its documents, and the order of
units, depend only on the inputs.
"""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from statex_dist.data.corpus.compressed import DamagedStreamError, inner_name, is_compressed, open_stream
from statex_dist.data.corpus.filters import Condition, all_hold
from statex_dist.data.corpus.json_lines import read_lines
from statex_dist.data.corpus.parquet_rows import read_rows, row_group_sizes
from statex_dist.data.corpus.records import Record, record_from
from statex_dist.errors import ConfigError, DataError

log = logging.getLogger(__name__)

JSONL_SUFFIXES = (".jsonl", ".ndjson")
PARQUET_SUFFIXES = (".parquet",)
TEXT_SUFFIXES = (
    *(".txt", ".text", ".md", ".rst", ".tex", ".org", ".pod", ".srt"),
    *(".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".java", ".js", ".ts", ".go", ".rs", ".sh", ".rb"),
)
DEFAULT_SUFFIXES = (*TEXT_SUFFIXES, *JSONL_SUFFIXES, *PARQUET_SUFFIXES)
_UNIT_BYTES = 8 << 20
# Every unit becomes a file or two: on a corpus of terabytes there should be thousands of them, not millions.
_MANY_UNITS = 4096
_UNIT_FILES = 512


@dataclass(frozen=True, slots=True)
class Unit:
    """A piece of work: whole text files, a byte range of a JSON-lines file or row groups of a parquet file.

    Attributes:
        kind: ``"text"``, ``"jsonl"`` or ``"parquet"``.
        paths: The files; exactly one unless the kind is text.
        begin: First byte or row group.
        end: One past the last. A compressed file of JSON lines is one unit: it cannot be entered in its middle.
    """

    kind: str
    paths: tuple[str, ...]
    begin: int = 0
    end: int = 0


@dataclass(slots=True)
class LeftOut:
    """What :func:`read_unit` left out, and where it is.

    Attributes:
        filtered: Records that did not meet a condition.
        undecodable: A message for each file that is not UTF-8.
        here: Returns file and place of the record that was yielded last.
    """

    filtered: int = 0
    undecodable: list[str] = field(default_factory=list)
    here: Callable[[], str] = str


def find_files(inputs: Sequence[str | Path], suffixes: Sequence[str] = DEFAULT_SUFFIXES) -> list[Path]:
    """Return the files that ``inputs`` name, in order and each once.

    Args:
        inputs: Files (any suffix), directories (walked in sorted order; hidden entries are skipped) or globs.
        suffixes: Suffixes taken from directories.

    Raises:
        DataError: An input does not exist, matches nothing, or is a directory without such files.
    """
    files: dict[str, Path] = {}
    for given in inputs:
        path = Path(given)
        if path.exists():
            if not path.is_dir() and not path.is_file():
                raise DataError(f"input {path} is neither a file nor a directory")
            found = _walk(path, suffixes) if path.is_dir() else [path]
        elif glob.has_magic(str(given)):
            matches = sorted(Path(match) for match in glob.glob(str(given), recursive=True))  # noqa: PTH207 - absolute globs
            found = [file for match in matches for file in (_walk(match, suffixes) if match.is_dir() else [match])]
            if not found:
                raise DataError(f"input {str(given)!r} matches no file")
        else:
            raise DataError(f"input {given} does not exist")
        if not found:
            raise DataError(
                f"input directory {given} has no file with a suffix of {', '.join(suffixes)} (or with .gz, .zst behind)"
            )
        for file in found:
            files.setdefault(os.path.realpath(file), file)
    if not files:
        raise DataError("no input given; name files, directories or globs")
    return list(files.values())


def _walk(directory: Path, suffixes: Sequence[str]) -> list[Path]:
    found, skipped = [], 0
    for folder, folders, names in os.walk(directory):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if name.startswith("."):
                continue
            if inner_name(name).lower().endswith(tuple(suffixes)):
                found.append(Path(folder) / name)
            else:
                skipped += 1
    if skipped and found:
        log.info("%s: %d files taken, %d of other suffixes left out", directory, len(found), skipped)
    return found


def split_units(files: Sequence[Path], unit_bytes: int | None = None) -> tuple[list[Unit], int]:
    """Return the units of ``files`` in order, and the files' bytes on disk.

    Args:
        files: What :func:`find_files` returned.
        unit_bytes: Size aimed at; default: 8 MiB, doubled until there are at most some thousand units.

    Raises:
        DataError: A file cannot be read, or a parquet file is damaged.
    """
    sizes = [_size(file) for file in files]
    total = sum(sizes)
    if unit_bytes is None:
        unit_bytes = _UNIT_BYTES
        while total > unit_bytes * _MANY_UNITS:
            unit_bytes *= 2
    units: list[Unit] = []
    texts: list[str] = []
    waiting = 0
    for file, size in zip(files, sizes, strict=True):
        kind = _kind(file)
        if texts and (kind != "text" or waiting + size > unit_bytes or len(texts) == _UNIT_FILES):
            units.append(Unit("text", tuple(texts)))
            texts, waiting = [], 0
        if kind == "text":
            texts.append(str(file))
            waiting += size
        elif kind == "jsonl":
            step = max(size, 1) if is_compressed(file.name) else unit_bytes
            units.extend(Unit(kind, (str(file),), begin, min(begin + step, size)) for begin in range(0, size, step))
        else:
            units.extend(_parquet_units(file, unit_bytes))
    if texts:
        units.append(Unit("text", tuple(texts)))
    return units, total


def read_unit(
    unit: Unit,
    vocab_size: int,
    text_field: str = "text",
    *,
    conditions: Sequence[Condition] = (),
    skip_undecodable: bool = False,
    left_out: LeftOut | None = None,
) -> Iterator[Record]:
    """Yield the documents of ``unit``.

    Args:
        unit: What to read.
        vocab_size: Bound of the ids in records that are tokenised already.
        text_field: Field or column that holds the text.
        conditions: Records that do not pass all of them are left out.
        skip_undecodable: Leave out text files that are not UTF-8 instead of raising.
        left_out: Counts what is left out.

    Raises:
        DataError: A file cannot be read or decoded, or a record is not a document; the message names file and place.
    """
    out = LeftOut() if left_out is None else left_out

    def parse(fields: dict[str, Any]) -> Record | None:
        if all_hold(conditions, fields):
            return record_from(fields, vocab_size, text_field)
        out.filtered += 1
        return None

    if unit.kind == "text":
        return _read_texts(unit.paths, out, skip_undecodable=skip_undecodable)

    def at(here: Callable[[], str]) -> None:
        out.here = here

    if unit.kind == "jsonl":
        return read_lines(unit.paths[0], unit.begin, unit.end, parse, at)
    return read_rows(
        unit.paths[0], unit.begin, unit.end, text_field, [condition.field for condition in conditions], parse, at
    )


def file_facts(path: str | Path) -> tuple[int, int]:
    """Return the size of a file and its modification time in nanoseconds: what tells that it is the same as before.

    Raises:
        DataError: It is not there any more.
    """
    try:
        found = os.stat(path)  # noqa: PTH116 - called for every file of the corpus
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    return found.st_size, found.st_mtime_ns


def check_filterable(units: Sequence[Unit]) -> None:
    """Refuse units whose documents have no fields that ``--where`` could look at.

    Raises:
        ConfigError: A unit is of text files.
    """
    for unit in units:
        if unit.kind == "text":
            raise ConfigError(f"--where looks at fields of .jsonl and .parquet; {unit.paths[0]} is a text file")


def _kind(file: Path) -> str:
    suffix = Path(inner_name(file.name)).suffix.lower()
    if suffix in JSONL_SUFFIXES:
        return "jsonl"
    if suffix not in PARQUET_SUFFIXES:
        return "text"
    if is_compressed(file.name):
        raise DataError(f"{file} is parquet inside {file.suffix}; parquet is compressed by itself: unpack the file")
    return "parquet"


def _size(file: Path) -> int:
    try:
        with file.open("rb"):
            size = file.stat().st_size
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error
    if not size and is_compressed(file.name):
        raise DataError(f"{file} has no byte, which no {file.suffix} file has; make it again or leave it out")
    return size


def _read_texts(paths: Sequence[str], out: LeftOut, *, skip_undecodable: bool) -> Iterator[Record]:
    for path in paths:
        out.here = partial(str, path)
        try:
            yield Record(text=_read_text(path))
        except UnicodeDecodeError as error:
            message = f"{path} is not UTF-8 text: byte {error.start} ({error.reason})"
            if not skip_undecodable:
                raise DataError(f"{message}; convert it, leave it out or skip such files") from error
            out.undecodable.append(message)


def _read_text(path: str) -> str:
    try:
        with open_stream(path) as file:
            return file.read().decode("utf-8")
    except DamagedStreamError as error:
        raise DataError(f"{path} is damaged or cut off: {error}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _parquet_units(file: Path, unit_bytes: int) -> Iterator[Unit]:
    sizes = row_group_sizes(str(file))
    begin, waiting = 0, 0
    for i, size in enumerate(sizes):
        waiting += size
        if waiting >= unit_bytes or i == len(sizes) - 1:
            yield Unit("parquet", (str(file),), begin, i + 1)
            begin, waiting = i + 1, 0
