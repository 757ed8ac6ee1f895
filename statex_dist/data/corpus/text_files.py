"""Text files, one document each."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from functools import partial

from statex_dist.data.corpus.compressed import DamagedStreamError, open_stream
from statex_dist.data.corpus.foreign_files import by_begin
from statex_dist.data.corpus.records import BadRecordError, ReadReport, Record
from statex_dist.errors import DataError

# UTF-32 first: its little-endian mark begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


def read_texts(paths: Sequence[str], report: ReadReport, most: int, *, skip_undecodable: bool) -> Iterator[Record]:
    """Yield the text of every file, without a byte order mark.

    Args:
        paths: The files.
        report: Takes bad files, if they are to be skipped.
        most: Bytes that a file may have, unpacked.
        skip_undecodable: Leave out files that are not UTF-8, with a message for each.

    Raises:
        DataError: A file cannot be read, is not UTF-8, or is too large.
    """
    for path in paths:
        report.kind = "text"
        report.here = partial(str, path)
        data = _read(path, most + 1)
        if len(data) > most:
            size = f"the file has more than {most} bytes"
            report.leave_out(path, f"{size}; {BadRecordError.LARGER}")
            continue
        try:
            refuse_other_encodings(data)
            text = _decoded(data)
            _refuse_zeros(data)
        except BadRecordError as error:
            if skip_undecodable:
                report.undecodable.append(f"{path} {error}")
            elif report.skip:
                report.leave_out(path, str(error))
            else:
                raise BadRecordError(
                    f"{path} {error}; convert it, leave it out, or skip such files with --skip-bad-records"
                ) from error
            continue
        data = b""
        yield Record(text=text)


def refuse_other_encodings(data: bytes) -> None:
    """Refuse data that begins with the mark of another encoding than UTF-8, or of another format than text.

    Raises:
        BadRecordError: It does.
    """
    for mark, name in _MARKS:
        if data.startswith(mark):
            raise BadRecordError(f"is {name}, not UTF-8 (by its byte order mark; iconv -f {name} -t UTF-8 converts it)")
    if (found := by_begin(data)) is not None:
        raise BadRecordError(f"is {found[0]}, not text; {found[1]}")


def check_text(path: str, size: int) -> None:
    """Check that the first ``size`` bytes of a text file are UTF-8.

    Raises:
        BadRecordError: They are not.
        DataError: The file cannot be read.
    """
    data = _read(path, size)
    try:
        refuse_other_encodings(data)
        codecs.getincrementaldecoder("utf-8")().decode(data, final=len(data) < size)
    except UnicodeDecodeError as error:
        raise BadRecordError(f"{path} is not UTF-8 text: byte {error.start} ({error.reason})") from error
    except BadRecordError as error:
        raise BadRecordError(f"{path} {error}") from error


def _refuse_zeros(data: bytes) -> None:
    """Refuse UTF-16 without a mark, in which plain English is UTF-8 too: every second byte is 0."""
    if b"\0" in data and (zeros := data.count(0)) * 4 > len(data):
        raise BadRecordError(
            f"is UTF-16, UTF-32 or no text: {zeros} of its {len(data)} bytes are 0 "
            "(iconv -f UTF-16LE -t UTF-8 converts it)"
        )


def _decoded(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadRecordError(f"is not UTF-8 text: byte {error.start} ({error.reason})") from error


def _read(path: str, size: int) -> bytes:
    """Return the first ``size`` bytes, or all if there are fewer."""
    try:
        with open_stream(path) as file:
            return file.read(size)
    except DamagedStreamError as error:
        raise DataError(f"{path} is damaged or cut off: {error}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
