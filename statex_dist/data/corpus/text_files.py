"""Text files, one document each; files of other formats, which would be taken for text, are refused."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Final

from statex_dist.data.compression import DamagedStreamError, inner_name, open_stream
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


_TO_ROWS: Final = "write its rows as .jsonl or .parquet"
_UNPACK: Final = "unpack it"
_BY_SUFFIX: Final = {
    **dict.fromkeys((".csv", ".tsv", ".psv", ".arrow", ".feather", ".orc", ".avro", ".xlsx", ".xls"), _TO_ROWS),
    **dict.fromkeys((".npy", ".npz", ".h5", ".hdf5", ".db", ".sqlite", ".lmdb", ".mds", ".tfrecord"), _TO_ROWS),
    **dict.fromkeys((".pkl", ".pickle", ".pt", ".pth", ".safetensors", ".bin", ".idx"), _TO_ROWS),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".tbz2", ".txz", ".7z", ".rar"), _UNPACK),
    **dict.fromkeys((".bz2", ".xz", ".lzma", ".lz4", ".br", ".z", ".zstd", ".gzip"), f"{_UNPACK}, or use .gz or .zst"),
    **dict.fromkeys((".pdf", ".doc", ".docx", ".odt", ".epub", ".warc", ".wet", ".wat"), "take the text out of it"),
}
# First bytes of a file, its format and the advice; only bytes that no text begins with.
_BY_BEGIN: Final = (
    (b"\x1f\x8b", "gzip data", "give the file the suffix .gz"),
    (b"\x28\xb5\x2f\xfd", "zstd data", "give the file the suffix .zst"),
    (b"PAR1\x15", "a parquet file", "give the file the suffix .parquet"),
    (b"ARROW1\0", "an Arrow file", _TO_ROWS),
    (b"\xff\xff\xff\xff", "an Arrow stream", _TO_ROWS),
    (b"PK\x03\x04", "a zip file", _UNPACK),
    (b"\xfd7zXZ\0", "xz data", _UNPACK),
    (b"BZh91AY&SY", "bzip2 data", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z file", _UNPACK),
    (b"%PDF-1.", "a PDF file", "take the text out of it"),
    (b"\x89HDF\r\n", "an HDF5 file", _TO_ROWS),
    (b"\x93NUMPY", "a numpy file", _TO_ROWS),
    (b"SQLite format 3\0", "an SQLite file", _TO_ROWS),
)
_TAR_AT: Final = 257


def by_name(name: str) -> str | None:
    """Return what to do with a file whose name says that it is of another format; ``None`` for any other name."""
    inner = inner_name(name).lower()
    return next((advice for suffix, advice in _BY_SUFFIX.items() if inner.endswith(suffix)), None)


def by_begin(data: bytes) -> tuple[str, str] | None:
    """Return of which other format data is by its begin, and what to do; ``None`` if it may be text."""
    if data[_TAR_AT : _TAR_AT + 5] == b"ustar" and data[_TAR_AT + 5 : _TAR_AT + 6] in (b"\0", b" "):
        return "a tar file", _UNPACK
    return next(((what, advice) for begin, what, advice in _BY_BEGIN if data.startswith(begin)), None)
