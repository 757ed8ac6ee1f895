"""JSON lines: a byte range of a plain file, or a compressed file from end to end."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from statex_dist.checkpoint.json_file import parse_json
from statex_dist.data.compression import DamagedStreamError, open_stream
from statex_dist.data.corpus.records import BadRecordError, Parse, ReadReport, Record
from statex_dist.data.corpus.text_files import refuse_other_encodings
from statex_dist.errors import DataError, shown

_CHUNK_BYTES = 1 << 20
_FEW_BRACKETS = 100
# The second: what stands between files with byte order marks that were put one behind the other.
_BLANK = (b"", codecs.BOM_UTF8)
_ONE_A_LINE = "one object a line is needed: jq -c '.[]' IN > OUT makes lines of an array, jq -c . of other JSON"


def read_lines(path: str, begin: int, end: int | None, parse: Parse, report: ReadReport, most: int) -> Iterator[Record]:
    """Yield the documents of every line that begins in ``begin <= byte < end`` and is not blank.

    Args:
        path: The file.
        begin: First byte of the range; 0 for a compressed file, which cannot be entered in its middle.
        end: One past the last, counted without compression; ``None`` for the end of the file.
        parse: Makes the documents of a line's object.
        report: Takes bad lines, if they are to be skipped.
        most: Bytes that a line may have.

    Raises:
        DataError: The file cannot be read, a line is not a JSON object, or ``parse`` refuses it; the message names
            file and line.
    """
    try:
        with open_stream(path) as file:
            at = _skip_to_line(file, begin, end) if begin and end is not None else 0
            yield from _Lines(path, file, parse, report, most).read(at, end)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


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


class _LongLineError(BadRecordError):
    """A line that was not read to its end."""


class _Lines:
    """The lines of one stream, from its place on."""

    def __init__(self, path: str, file: BinaryIO, parse: Parse, report: ReadReport, most: int):
        self._path = path
        self._file = file
        self._parse = parse
        self._report = report
        self._most = most
        self._number = 0
        self._first = 0
        self._before: int | None = None

    def read(self, at: int, end: int | None) -> Iterator[Record]:
        """Yield the documents of the lines from byte ``at``, the stream's place, up to ``end``."""
        self._first = at
        self._report.here = self._place
        readline, most = self._file.readline, self._most + 1
        while end is None or at < end:
            try:
                line = readline(most)
            except DamagedStreamError as error:
                raise self._damaged(error) from error
            if not line:
                return
            self._number += 1
            self._report.lines += 1
            at += len(line)
            found: list[Record] = []
            try:
                if at == len(line):
                    refuse_other_encodings(line)
                if len(line) == most:
                    raise _LongLineError(f"the line has more than {self._most} bytes; {BadRecordError.LARGER}")
                if line.strip() not in _BLANK:
                    found = self._parse(_object(line))
            except BadRecordError as error:
                self._report.leave_out(self._path, str(error), line=self._number)
                if isinstance(error, _LongLineError) and (end is None or at < end):
                    at += self._pass_over(line)
            except DataError as error:
                raise DataError(f"{self._place()}: {error}") from error
            # A document may be a large part of memory: neither it nor its line is held here while it is consumed.
            line = b""
            while found:
                yield found.pop(0)

    def _pass_over(self, piece: bytes) -> int:
        """Read to the end of a line whose first bytes are ``piece``, and return how many bytes that were."""
        passed = 0
        while piece and not piece.endswith(b"\n"):
            try:
                piece = self._file.readline(_CHUNK_BYTES)
            except DamagedStreamError as error:
                raise self._damaged(error) from error
            passed += len(piece)
        return passed

    def _damaged(self, error: DamagedStreamError) -> DataError:
        return DataError(f"{self._path} is damaged or cut off behind line {self._number}: {error}")

    def _place(self) -> str:
        if self._before is None:
            self._before = _lines_before(self._path, self._first) if self._first else 0
        return f"{self._path}:{self._before + self._number}"


class _CountingDecoder:
    """Decodes JSON as ``json.loads`` does, and counts the pairs of the outermost object.

    Attributes:
        pairs: Their number in the text decoded last; more than its keys where a key is repeated.
    """

    def __init__(self) -> None:
        self.pairs = 0
        self.decode = json.JSONDecoder(object_pairs_hook=self._note).decode

    def _note(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        self.pairs = len(pairs)  # the outermost object comes last
        return dict(pairs)


_decoder = _CountingDecoder()


def _object(line: bytes) -> dict[str, Any]:
    """Return the line's object."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRecordError(f"not UTF-8 (byte {error.start} of the line)") from error
    try:
        text = text.removeprefix("\ufeff")
        record = _decoder.decode(text)
        if not isinstance(record, dict):
            hint = f"; {_ONE_A_LINE}" if isinstance(record, list) else ""
            raise BadRecordError(f"a JSON object is needed, not {type(record).__name__}{hint}")
        if len(record) != _decoder.pairs:
            # Python takes the last of them, other readers the first.
            raise BadRecordError(f"field {shown(_repeated(text), 60)} stands in it more than once")
        kinds = set(map(type, record.values()))
        # A walk through all values would double the time of long lists of ids. A text with few brackets is not deep.
        if (dict in kinds) if list not in kinds else (text.count("[") + text.count("{") > _FEW_BRACKETS):
            parse_json(text, parse=lambda _: record)
    except RecursionError as error:
        raise BadRecordError("not valid JSON (it is nested too deeply)") from error
    except ValueError as error:
        hint = f"; {_ONE_A_LINE}" if text.strip() in ("[", "{") else ""
        raise BadRecordError(f"not valid JSON ({error}){hint}") from error
    return cast("dict[str, Any]", record)


def _repeated(text: str) -> str:
    """Return the first key that stands more than once in the object of ``text``."""
    pairs = json.loads(text, object_pairs_hook=lambda found: found)
    names = [name for name, _ in pairs]
    return next(name for name in names if names.count(name) > 1)


def _lines_before(path: str, at: int) -> int:
    number, left = 0, at
    with Path(path).open("rb") as file:
        while left > 0 and (chunk := file.read(min(left, _CHUNK_BYTES))):
            number += chunk.count(b"\n")
            left -= len(chunk)
    return number
