"""From files on disk to documents: text files, JSON lines and parquet, found, split into work units and read.

A unit is small enough to balance workers and large enough to hide what a task costs; its documents, and the order of
units, depend only on the inputs.
"""

from __future__ import annotations

import glob
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from statex_dist.errors import DataError

log = logging.getLogger(__name__)

JSONL_SUFFIXES = (".jsonl", ".ndjson")
PARQUET_SUFFIXES = (".parquet",)
TEXT_SUFFIXES = (
    *(".txt", ".text", ".md", ".rst", ".tex", ".org", ".pod", ".srt"),
    *(".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".java", ".js", ".ts", ".go", ".rs", ".sh", ".rb"),
)
DEFAULT_SUFFIXES = (*TEXT_SUFFIXES, *JSONL_SUFFIXES, *PARQUET_SUFFIXES)
_UNIT_BYTES = 8 << 20
_UNIT_FILES = 512


@dataclass(frozen=True, slots=True)
class Unit:
    """A piece of work: whole text files, a byte range of a JSON-lines file or row groups of a parquet file.

    Attributes:
        kind: ``"text"``, ``"jsonl"`` or ``"parquet"``.
        paths: The files; exactly one unless the kind is text.
        begin: First byte or row group.
        end: One past the last.
    """

    kind: str
    paths: tuple[str, ...]
    begin: int = 0
    end: int = 0


@dataclass(frozen=True, slots=True)
class Record:
    """A document as read: ``text``, or ``input_ids`` ``[n]`` int64 with an optional ``loss_mask`` ``[n]`` uint8.

    Ids are checked against the vocabulary where they are read, so that the message can name the place.
    """

    text: str | None = None
    input_ids: np.ndarray | None = None
    loss_mask: np.ndarray | None = None


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
            raise DataError(f"input directory {given} has no file with a suffix of {', '.join(suffixes)}")
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
            if name.lower().endswith(tuple(suffixes)):
                found.append(Path(folder) / name)
            else:
                skipped += 1
    if skipped and found:
        log.info("%s: %d files taken, %d of other suffixes left out", directory, len(found), skipped)
    return found


def split_units(files: Sequence[Path], unit_bytes: int = _UNIT_BYTES) -> tuple[list[Unit], int]:
    """Return the units of ``files`` in order, and the files' bytes.

    Raises:
        DataError: A file cannot be read, or a parquet file is damaged.
    """
    units: list[Unit] = []
    texts: list[str] = []
    waiting = total = 0
    for file in files:
        size = _size(file)
        total += size
        kind = _kind(file)
        if texts and (kind != "text" or waiting + size > unit_bytes or len(texts) == _UNIT_FILES):
            units.append(Unit("text", tuple(texts)))
            texts, waiting = [], 0
        if kind == "text":
            texts.append(str(file))
            waiting += size
        elif kind == "jsonl":
            units.extend(
                Unit(kind, (str(file),), begin, min(begin + unit_bytes, size)) for begin in range(0, size, unit_bytes)
            )
        else:
            units.extend(_parquet_units(file, unit_bytes))
    if texts:
        units.append(Unit("text", tuple(texts)))
    return units, total


def read_unit(
    unit: Unit, vocab_size: int, text_field: str = "text", undecodable: list[str] | None = None
) -> Iterator[Record]:
    """Yield the documents of ``unit``.

    Args:
        unit: What to read.
        vocab_size: Bound of the ids in records that are tokenised already.
        text_field: Field or column that holds the text.
        undecodable: Collects a message for each text file that is not UTF-8, instead of raising.

    Raises:
        DataError: A file cannot be read or decoded, or a record is not a document; the message names file and place.
    """
    if unit.kind == "text":
        return _read_texts(unit.paths, undecodable)
    if unit.kind == "jsonl":
        return _read_jsonl(unit, vocab_size, text_field)
    return _read_parquet(unit, vocab_size, text_field)


def _kind(file: Path) -> str:
    suffix = file.suffix.lower()
    return "jsonl" if suffix in JSONL_SUFFIXES else "parquet" if suffix in PARQUET_SUFFIXES else "text"


def _size(file: Path) -> int:
    try:
        with file.open("rb"):
            return file.stat().st_size
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error


def _read_texts(paths: Sequence[str], undecodable: list[str] | None) -> Iterator[Record]:
    for path in paths:
        try:
            yield Record(text=_read_text(path))
        except UnicodeDecodeError as error:
            message = f"{path} is not UTF-8 text: byte {error.start} ({error.reason})"
            if undecodable is None:
                raise DataError(f"{message}; convert it, leave it out or skip such files") from error
            undecodable.append(message)


def _read_text(path: str) -> str:
    try:
        return Path(path).read_bytes().decode("utf-8")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _read_jsonl(unit: Unit, vocab_size: int, text_field: str) -> Iterator[Record]:
    path = unit.paths[0]
    with Path(path).open("rb") as file:
        at = unit.begin
        if at:
            # The line that runs into this range belongs to the range before; a line that starts exactly here is ours.
            file.seek(at - 1)
            at = at - 1 + len(file.readline())
        for line in file:
            if at >= unit.end:
                return
            if line.strip():
                try:
                    yield _json_record(line, vocab_size, text_field)
                except DataError as error:
                    raise DataError(f"{path}:{_line_number(path, at)}: {error}") from error
            at += len(line)


def _line_number(path: str, at: int) -> int:
    with Path(path).open("rb") as file:
        return file.read(at).count(b"\n") + 1


def _json_record(line: bytes, vocab_size: int, text_field: str) -> Record:
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 (byte {error.start} of the line)") from error
    except ValueError as error:
        raise DataError(f"not valid JSON ({error})") from error
    if not isinstance(record, dict):
        raise DataError(f"a JSON object is needed, not {type(record).__name__}")
    return record_from(record, vocab_size, text_field)


def record_from(record: dict[str, Any], vocab_size: int, text_field: str) -> Record:
    """Make a :class:`Record` of a mapping with a text field or ``input_ids``.

    Raises:
        DataError: It has neither, a value is of the wrong type, or an id is outside the vocabulary.
    """
    if record.get("input_ids") is not None:
        return _tokenized_record(record, vocab_size)
    text = record.get(text_field)
    if text is None:
        raise DataError(f"no field {text_field!r} or 'input_ids' (there are: {', '.join(map(str, record)) or 'none'})")
    if not isinstance(text, str):
        raise DataError(f"field {text_field!r} is {type(text).__name__}, a string is needed")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"field {text_field!r} has a lone surrogate at character {error.start}") from error
    return Record(text=text)


def _tokenized_record(record: dict[str, Any], vocab_size: int) -> Record:
    ids = _integers(record["input_ids"], "input_ids")
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if len(outside):
        raise DataError(f"input_ids has {outside[0]}, outside the tokenizer's vocabulary 0..{vocab_size - 1}")
    if record.get("loss_mask") is None:
        return Record(input_ids=ids)
    mask = _integers(record["loss_mask"], "loss_mask")
    if len(mask) != len(ids):
        raise DataError(f"loss_mask has {len(mask)} entries, input_ids {len(ids)}")
    if ((mask != 0) & (mask != 1)).any():
        raise DataError("loss_mask has entries other than 0 and 1")
    return Record(input_ids=ids, loss_mask=mask.astype(np.uint8))


def _integers(values: Any, name: str) -> np.ndarray:
    try:
        array = np.asarray(values)
        if isinstance(values, list) and array.ndim == 1 and (array.dtype.kind in "bi" or not len(array)):
            return array.astype(np.int64)
    except (ValueError, OverflowError):
        pass
    raise DataError(f"{name} must be a list of integers")


def _parquet_units(file: Path, unit_bytes: int) -> Iterator[Unit]:
    with _open_parquet(str(file)) as parquet:
        sizes = [parquet.metadata.row_group(i).total_byte_size for i in range(parquet.num_row_groups)]
    begin, waiting = 0, 0
    for i, size in enumerate(sizes):
        waiting += size
        if waiting >= unit_bytes or i == len(sizes) - 1:
            yield Unit("parquet", (str(file),), begin, i + 1)
            begin, waiting = i + 1, 0


def _open_parquet(path: str) -> Any:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        return ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable parquet file: {_first_line(error)}") from error


def _read_parquet(unit: Unit, vocab_size: int, text_field: str) -> Iterator[Record]:
    import pyarrow

    path = unit.paths[0]
    with _open_parquet(path) as parquet:
        names = parquet.schema_arrow.names
        columns = [name for name in (text_field, "input_ids", "loss_mask") if name in names]
        if text_field not in columns and "input_ids" not in columns:
            raise DataError(
                f"{path}: no column {text_field!r} or 'input_ids' (there are: {', '.join(names) or 'none'})"
            )
        row = sum(parquet.metadata.row_group(i).num_rows for i in range(unit.begin))
        for group in range(unit.begin, unit.end):
            try:
                table = parquet.read_row_group(group, columns=columns)
                rows = table.to_pylist()
            except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
                raise DataError(f"{path}: row group {group} cannot be read: {_first_line(error)}") from error
            for record in rows:
                try:
                    yield record_from(record, vocab_size, text_field)
                except DataError as error:
                    raise DataError(f"{path}: row {row}: {error}") from error
                row += 1


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
