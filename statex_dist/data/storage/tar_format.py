"""Webdataset's tar shards, read at random: the index and a shard's file. Needs numpy and xxhash, not ``webdataset``.

Webdataset itself reads tars only from front to end and cannot resume. With the place of every document known, a tar is
as random access as MDS: ``prepare`` writes these places beside each shard, for tars of other origin they are found once
(:mod:`statex_dist.data.storage.tar_foreign`).

Layout of our datasets::

    shards.json                {"version": 1, "format": "wds", "shards": [...]}
    shard-00000.tar            samples of many documents each: KEY.lengths.npy, KEY.loss_mask.npy, KEY.tokens.npy
    shard-00000.tar.index.npy  [documents, 3] int64: first byte of the tokens, their number, first byte of the mask,
                               which is -1 where there is none

A sample holds many documents because tar spends a header and padding on every member: with one document a sample,
ordinary text takes 2.67 bytes a token instead of 2.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from statex_dist.checkpoint.json_file import parse_json
from statex_dist.data.storage.npy import read_npy
from statex_dist.data.storage.shards import TOKEN_DTYPES, FileEntry, ShardEntry
from statex_dist.data.store import Piece
from statex_dist.errors import DataError, reason

FORMAT = "wds"
INDEX_NAME = "shards.json"
INDEX_VERSION = 1
MEMBERS_SUFFIX = ".index.npy"

DTYPE = "dtype"
HAS_LOSS_MASK = "loss_mask"
MEMBERS_PATH = "members_path"
"""Keys of :attr:`ShardEntry.details`; the last only where the member index does not lie beside the shard."""


class TarShard:
    """One open raw shard: the memory map and, for each document, where its values begin and how many there are.

    Args:
        path: The raw tar.
        entry: Its entry in the index.

    Attributes:
        lengths: ``[documents]`` int64, tokens of each document.

    Raises:
        DataError: The member index is unreadable or not of this tar.
    """

    def __init__(self, path: Path, entry: ShardEntry):
        self._dtype = np.dtype(entry.details[DTYPE])
        try:
            self._map = np.memmap(path, np.uint8, mode="r")
        except (OSError, ValueError) as error:
            raise DataError(f"{path} is not a readable tar ({error}); restore it or prepare the data again") from error
        if MEMBERS_PATH in entry.details:
            members = Path(entry.details[MEMBERS_PATH])
        else:
            assert entry.companion is not None
            members = path.with_name(entry.companion.name)
        rows = read_members(members, entry.documents)
        self._begin, self.lengths, self._mask_begin = np.ascontiguousarray(rows.T)
        size = len(self._map)
        room = (size - self._begin) // self._dtype.itemsize
        wrong = (self._begin < 0) | (self.lengths < 0) | (self.lengths > room)
        wrong |= (self._mask_begin < -1) | ((self._mask_begin >= 0) & (self.lengths > size - self._mask_begin))
        if wrong.any():
            raise DataError(
                f"{members} does not fit {path}: document {int(wrong.argmax())} lies outside of its {size} bytes; "
                "restore both or prepare the data again"
            )

    def read(self, i: int, start: int, stop: int) -> Piece:
        """Return tokens ``start..stop`` of document ``i``, as views of the map."""
        if not 0 <= start <= stop <= self.lengths[i]:
            raise IndexError(f"tokens {start}..{stop} of a document of {self.lengths[i]}")
        n = stop - start
        tokens = np.frombuffer(self._map, self._dtype, n, int(self._begin[i]) + start * self._dtype.itemsize)
        if self._mask_begin[i] < 0:
            return Piece(tokens)
        return Piece(tokens, np.frombuffer(self._map, np.uint8, n, int(self._mask_begin[i]) + start))


def read_members(path: Path, documents: int) -> np.ndarray:
    """Return the member index in ``path``, ``[documents, 3]`` int64.

    Raises:
        DataError: It is missing, damaged or of another number of documents.
    """
    try:
        return read_npy(path, "int64", (documents, 3))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} is not a readable member index ({error}); restore it or prepare the data again"
        ) from error


def read_index(content: bytes, origin: str) -> list[ShardEntry]:
    """Return the shards that ``content``, a ``shards.json``, describes.

    Args:
        content: Its bytes.
        origin: Its path or URL, for messages.

    Raises:
        DataError: It is damaged, empty or of another version.
    """
    try:
        index = parse_json(content)
        shards, format, version = index["shards"], index["format"], index["version"]
        if not isinstance(shards, list):
            raise TypeError(f"its shards are {reprlib.repr(shards)}, not a list")
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{origin} is not a readable tar index ({reason(error)}); prepare the data again") from error
    if format != FORMAT or version != INDEX_VERSION or not shards:
        raise DataError(
            f"{origin}: format {reprlib.repr(format)}, version {reprlib.repr(version)}, {len(shards)} shards; needed: "
            f"{FORMAT!r}, {INDEX_VERSION} and at least one; prepare the data again"
        )
    return [_entry(f"{origin}: shard {number}", shard) for number, shard in enumerate(shards)]


def _entry(where: str, record: Any) -> ShardEntry:
    try:
        return entry_from_record(record)
    except DataError as error:
        raise DataError(f"{where}: {error}; restore the index or prepare the data again") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{where} is not a readable tar index entry ({reason(error)}); prepare the data again"
        ) from error


def pack_index(entries: Sequence[ShardEntry]) -> bytes:
    """Return ``entries`` as the bytes of a ``shards.json``."""
    shards = [entry_to_record(entry) for entry in entries]
    return (json.dumps({"version": INDEX_VERSION, "format": FORMAT, "shards": shards}, indent=1) + "\n").encode()


def entry_to_record(entry: ShardEntry) -> dict[str, Any]:
    """Return ``entry`` as it is written in JSON."""
    return {
        **_file_to_record(entry.raw),
        "documents": entry.documents,
        **entry.details,
        "compression": entry.compression,
        "packed": entry.packed and _file_to_record(entry.packed),
        "companion": entry.companion and _file_to_record(entry.companion),
    }


def entry_from_record(record: Mapping[str, Any]) -> ShardEntry:
    """Return the entry that :func:`entry_to_record` wrote.

    Raises:
        DataError: A value is not allowed.
        KeyError: One is missing.
        TypeError: Something in it is no mapping.
    """
    return ShardEntry(
        raw=_file_from_record(record),
        packed=None if record["packed"] is None else _file_from_record(record["packed"]),
        compression=record["compression"],
        companion=_file_from_record(record["companion"]),
        documents=record["documents"],
        details=array_details(record),
    )


def array_details(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tokens' type and whether there are masks, as :attr:`ShardEntry.details` hold them.

    Raises:
        DataError: A value is not allowed.
        KeyError: One is missing.
    """
    dtype, loss_mask = record[DTYPE], record[HAS_LOSS_MASK]
    if dtype not in TOKEN_DTYPES:
        raise DataError(f"{DTYPE} is {reprlib.repr(dtype)}; allowed: {', '.join(TOKEN_DTYPES)}")
    if not isinstance(loss_mask, bool):
        raise DataError(f"{HAS_LOSS_MASK} is {reprlib.repr(loss_mask)}; allowed: true, false")
    return {DTYPE: dtype, HAS_LOSS_MASK: loss_mask}


def _file_to_record(file: FileEntry) -> dict[str, Any]:
    return {"file": file.name, "bytes": file.size, "hashes": dict(file.hashes)}


def _file_from_record(record: Mapping[str, Any]) -> FileEntry:
    return FileEntry(record["file"], record["bytes"], record["hashes"])
