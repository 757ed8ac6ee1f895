"""Files of other formats than text, JSON lines and parquet, which would be taken for one document of text."""

from __future__ import annotations

from typing import Final

from statex_dist.data.corpus.compressed import inner_name

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
# What a file begins with, and what that is; only those that no text begins with.
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
