"""JSON lines: a byte range of a plain file, or a compressed file from end to end."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

from statex_dist.data.corpus.compressed import DamagedStreamError, is_compressed, open_stream
from statex_dist.data.corpus.records import Parse, Record
from statex_dist.errors import DataError

_CHUNK_BYTES = 1 << 20


def read_lines(
    path: str, begin: int, end: int, parse: Parse, at: Callable[[Callable[[], str]], None]
) -> Iterator[Record]:
    """Yield ``parse(object)`` for every line that begins in ``begin <= byte < end`` and is not blank.

    A compressed file has no ranges: all of its lines are read.

    Args:
        path: The file.
        begin: First byte of the range.
        end: One past the last.
        parse: Makes a document of a line's object, or ``None`` of one to leave out.
        at: Told before a record is yielded what returns its file and line.

    Raises:
        DataError: The file cannot be read, a line is not a JSON object, or ``parse`` refuses it; the message names
            file and line.
    """
    try:
        if is_compressed(path):
            yield from _read_compressed(path, parse, at)
        else:
            yield from _read_range(path, begin, end, parse, at)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _read_range(
    path: str, begin: int, end: int, parse: Parse, tell: Callable[[Callable[[], str]], None]
) -> Iterator[Record]:
    with Path(path).open("rb") as file:
        at = _skip_to_line(file, begin, end) if begin else 0
        while at < end and (line := file.readline()):
            try:
                found = _parse_line(line, parse)
            except DataError as error:
                raise DataError(f"{_place(path, at)}: {error}") from error
            tell(partial(_place, path, at))
            at += len(line)
            # A document may be a large part of memory: neither it nor its line is held here while it is consumed.
            line = b""
            if found:
                yield found.pop()


def _skip_to_line(file: BinaryIO, begin: int, end: int) -> int:
    """Go to the first line that starts at ``begin`` or behind it and return where that is, or ``end`` if that is less.

    The line that runs into a range belongs to the range before. It may be longer than many ranges, so none of them
    reads more of it than its own bytes.
    """
    file.seek(begin - 1)
    at = begin - 1
    while at < end:
        piece = file.readline(_CHUNK_BYTES)
        at += len(piece)
        if not piece or piece.endswith(b"\n"):
            return at
    return end


def _read_compressed(path: str, parse: Parse, tell: Callable[[Callable[[], str]], None]) -> Iterator[Record]:
    number = 0
    with open_stream(path) as file:
        while True:
            try:
                line = file.readline()
            except DamagedStreamError as error:
                raise DataError(f"{path} is damaged or cut off behind line {number}: {error}") from error
            if not line:
                return
            number += 1
            try:
                found = _parse_line(line, parse)
            except DataError as error:
                raise DataError(f"{path}:{number}: {error}") from error
            tell(partial(str, f"{path}:{number}"))
            line = b""
            if found:
                yield found.pop()


def _parse_line(line: bytes, parse: Parse) -> list[Record]:
    """Return the line's document, or nothing for a blank line and one to leave out."""
    if not line.strip():
        return []
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 (byte {error.start} of the line)") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"not valid JSON ({error})") from error
    if not isinstance(record, dict):
        raise DataError(f"a JSON object is needed, not {type(record).__name__}")
    found = parse(record)
    return [] if found is None else [found]


def _place(path: str, at: int) -> str:
    return f"{path}:{_line_number(path, at)}"


def _line_number(path: str, at: int) -> int:
    number, left = 1, at
    with Path(path).open("rb") as file:
        while left > 0 and (chunk := file.read(min(left, _CHUNK_BYTES))):
            number += chunk.count(b"\n")
            left -= len(chunk)
    return number
