"""From files on disk to documents: text files, JSON lines and parquet, found, split into work units and read.

A unit is small enough to balance workers and large enough to hide what a task costs; its documents, and the order of
units, depend only on the inputs.
"""

from __future__ import annotations

import glob
import logging
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from statex_dist.data.compression import inner_name, is_compressed
from statex_dist.data.corpus.document_rules import DocumentRules
from statex_dist.data.corpus.json_lines import read_lines
from statex_dist.data.corpus.parquet_rows import read_rows, row_group_sizes
from statex_dist.data.corpus.records import ReadReport, Record
from statex_dist.data.corpus.rows import RowParser
from statex_dist.data.corpus.text_files import by_name, read_texts
from statex_dist.errors import ConfigError, DataError

log = logging.getLogger(__name__)

JSONL_SUFFIXES = (".jsonl", ".ndjson")
PARQUET_SUFFIXES = (".parquet",)
TEXT_SUFFIXES = (
    *(".txt", ".text", ".md", ".rst", ".tex", ".org", ".pod", ".srt"),
    *(".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".java", ".js", ".ts", ".go", ".rs", ".sh", ".rb"),
)
# JSON lines in many corpora; not looked for in directories, where such a file is most often something else.
_JSON_SUFFIX = ".json"
DEFAULT_SUFFIXES = (*TEXT_SUFFIXES, *JSONL_SUFFIXES, *PARQUET_SUFFIXES)
_UNIT_BYTES = 8 << 20
# Every unit becomes a file or two: on a corpus of terabytes there should be thousands of them, not millions.
_MANY_UNITS = 4096
_UNIT_FILES = 512
_SAMPLE_BYTES = 1 << 20
_NAMED = 3
_SPECIAL = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a directory",
}
_RULES = DocumentRules()


@dataclass(frozen=True, slots=True)
class WorkUnit:
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
            found = _walk(path, suffixes) if path.is_dir() else [_regular(path)]
        elif glob.has_magic(str(given)):
            matches = sorted(Path(match) for match in glob.glob(str(given), recursive=True))  # noqa: PTH207 - absolute globs
            found = [
                file for match in matches for file in (_walk(match, suffixes) if match.is_dir() else [_regular(match)])
            ]
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
    found: list[Path] = []
    skipped, special, links = 0, [], []
    for folder, folders, names in os.walk(directory):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        links += [f"{folder}/{name}" for name in folders if os.path.islink(f"{folder}/{name}")]  # noqa: PTH114 - many
        for name in sorted(names):
            if name.startswith("."):
                continue
            if not inner_name(name).lower().endswith(tuple(suffixes)):
                skipped += 1
            elif (what := _special(path := f"{folder}/{name}")) is not None:
                special.append(f"{path} ({what})")
            else:
                found.append(Path(path))
    if skipped and found:
        log.info("%s: %d files taken, %d of other suffixes left out", directory, len(found), skipped)
    for what, paths in (("not a regular file", special), ("links to directories", links)):
        if paths:
            log.warning("%s: %d left out, %s: %s", directory, len(paths), what, ", ".join(paths[:_NAMED]))
    return found


def _regular(path: Path) -> Path:
    if (what := _special(path)) is not None:
        raise DataError(f"input {path} is {what}, not a regular file or a directory; write its content to a file")
    return path


def _special(path: str | Path) -> str | None:
    """Return the kind of file at ``path``, or ``None`` for a regular file; reading any other could block."""
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116 - called for every file of the corpus
    except OSError:
        return None  # said when it is opened
    return None if stat.S_ISREG(mode) else _SPECIAL.get(stat.S_IFMT(mode), "not a file")


def split_units(files: Sequence[Path], unit_bytes: int | None = None) -> tuple[list[WorkUnit], int]:
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
    units: list[WorkUnit] = []
    texts: list[str] = []
    waiting = 0
    for file, size in zip(files, sizes, strict=True):
        kind = _kind(file)
        if texts and (kind != "text" or waiting + size > unit_bytes or len(texts) == _UNIT_FILES):
            units.append(WorkUnit("text", tuple(texts)))
            texts, waiting = [], 0
        if kind == "text":
            texts.append(str(file))
            waiting += size
        elif kind == "jsonl":
            step = max(size, 1) if is_compressed(file.name) else unit_bytes
            units.extend(WorkUnit(kind, (str(file),), begin, min(begin + step, size)) for begin in range(0, size, step))
        else:
            units.extend(_parquet_units(file, unit_bytes))
    if texts:
        units.append(WorkUnit("text", tuple(texts)))
    return units, total


def read_unit(
    unit: WorkUnit,
    vocab_size: int,
    rules: DocumentRules = _RULES,
    report: ReadReport | None = None,
    *,
    sample: bool = False,
) -> Iterator[Record]:
    """Yield the documents of ``unit``.

    Raises:
        DataError: A file cannot be read or decoded, or a record is not a document; the message names file and place.
    """
    report = ReadReport() if report is None else report
    report.skip = rules.skip_bad_records
    most = rules.max_document_bytes
    if unit.kind == "text":
        return read_texts(unit.paths, report, most, skip_undecodable=rules.skip_undecodable)
    parse = RowParser(vocab_size, rules, report)
    if unit.kind == "jsonl":
        end = _SAMPLE_BYTES if sample else None if is_compressed(unit.paths[0]) else unit.end
        return read_lines(unit.paths[0], unit.begin, end, parse, report, most)
    return read_rows(unit.paths[0], unit.begin, unit.end, rules, parse, report, sample=sample)


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


def check_filterable(units: Sequence[WorkUnit]) -> None:
    """Refuse units whose documents have no fields that ``--where`` could look at.

    Raises:
        ConfigError: A unit is of text files.
    """
    for unit in units:
        if unit.kind == "text":
            raise ConfigError(
                f"--where looks at fields of .jsonl and .parquet; {unit.paths[0]} is a text file; leave it out of the "
                "inputs (for example by a glob: 'DIR/*.jsonl')"
            )


def _kind(file: Path) -> str:
    suffix = Path(inner_name(file.name)).suffix.lower()
    if suffix in (*JSONL_SUFFIXES, _JSON_SUFFIX):
        return "jsonl"
    if suffix not in PARQUET_SUFFIXES:
        if (advice := by_name(file.name)) is not None:
            raise DataError(f"{file} is no file of text by its suffix; {advice}, or name it .txt if it is text")
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


def _parquet_units(file: Path, unit_bytes: int) -> Iterator[WorkUnit]:
    sizes = row_group_sizes(str(file))
    begin, waiting = 0, 0
    for i, size in enumerate(sizes):
        waiting += size
        if waiting >= unit_bytes or i == len(sizes) - 1:
            yield WorkUnit("parquet", (str(file),), begin, i + 1)
            begin, waiting = i + 1, 0
