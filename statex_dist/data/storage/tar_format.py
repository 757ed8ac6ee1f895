"""Webdataset's tar shards, read at random: the index and a shard's file. Needs numpy and xxhash, not ``webdataset``.

Webdataset itself reads tars only from front to end and cannot resume. With the place of every document known, a tar is
as random access as MDS: ``prepare`` writes these places beside each shard, for tars of other origin they are found
once, and kept in ``tar-index/`` of the cache by the tar's path, size and time of change.

Layout of our datasets::

    shards.json                {"version": 1, "format": "wds", "shards": [...]}
    shard-00000.tar            samples of many documents each: KEY.lengths.npy, KEY.loss_mask.npy, KEY.tokens.npy
    shard-00000.tar.index.npy  [documents, 3] int64: first byte of the tokens, their number, first byte of the mask,
                               which is -1 where there is none

A sample holds many documents because tar spends a header and padding on every member: with one document a sample,
ordinary text takes 2.67 bytes a token instead of 2.
"""

from __future__ import annotations

import gzip
import json
import logging
import math
import os
import reprlib
import shutil
import time
import zlib
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from statex_dist.checkpoint.json_file import read_json
from statex_dist.data.storage.npy import read_npy
from statex_dist.data.storage.schemes import is_disk_error
from statex_dist.data.storage.shards import TOKEN_DTYPES, FileEntry, MappedShard, ShardEntry, hash_file, parse_index
from statex_dist.data.storage.tar_members import scan_tar
from statex_dist.durable.files import write_durably
from statex_dist.durable.lock import acquire
from statex_dist.errors import DataError

log = logging.getLogger(__name__)

FORMAT = "wds"
INDEX_NAME = "shards.json"
INDEX_VERSION = 1
MEMBERS_SUFFIX = ".index.npy"

DTYPE = "dtype"
HAS_LOSS_MASK = "loss_mask"
MEMBERS_PATH = "members_path"
"""Keys of :attr:`ShardEntry.details`; the last only where the member index does not lie beside the shard."""


class TarShard(MappedShard):
    """One open raw shard: the memory map and, for each document, where its values begin and how many there are.

    Raises:
        DataError: The member index is unreadable or not of this tar.
    """

    def __init__(self, path: Path, entry: ShardEntry):
        try:
            super().__init__(path, entry.details[DTYPE])
        except (OSError, ValueError) as error:
            raise DataError(f"{path} is not a readable tar ({error}); restore it or prepare the data again") from error
        if MEMBERS_PATH in entry.details:
            members = Path(entry.details[MEMBERS_PATH])
        else:
            assert entry.companion is not None
            members = path.with_name(entry.companion.name)
        rows = read_members(members, entry.documents)
        self._place(*np.ascontiguousarray(rows.T))
        size = len(self._map)
        room = (size - self._begin) // self._dtype.itemsize
        wrong = (self._begin < 0) | (self.lengths < 0) | (self.lengths > room)
        wrong |= (self._mask_begin < -1) | ((self._mask_begin >= 0) & (self.lengths > size - self._mask_begin))
        if wrong.any():
            raise DataError(
                f"{members} does not fit {path}: document {int(wrong.argmax())} lies outside of its {size} bytes; "
                "restore both or prepare the data again"
            )


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

    Raises:
        DataError: It is damaged, empty or of another version.
    """
    return parse_index(content, origin, "tar index entry", _wrong_format, entry_from_record)


def _wrong_format(index: Mapping[str, Any]) -> str | None:
    format, version = index["format"], index["version"]
    if format == FORMAT and version == INDEX_VERSION and index["shards"]:
        return None
    return (
        f"format {reprlib.repr(format)}, version {reprlib.repr(version)}, {len(index['shards'])} shards; needed: "
        f"{FORMAT!r}, {INDEX_VERSION} and at least one"
    )


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


# Increased when tars are walked in another way, so that the caches of older versions are not used.
_VERSION = 2
_HASH = "xxh64"
_REPORT_SECONDS = 10.0


def find_tars(directory: Path) -> list[Path]:
    """Return the ``*.tar`` and ``*.tar.gz`` in ``directory``, by name.

    Raises:
        DataError: One is there in both forms.
    """
    tars = sorted(path for path in directory.iterdir() if path.name.endswith((".tar", ".tar.gz")) and path.is_file())
    names = {path.name for path in tars}
    if both := sorted(name for name in names if f"{name}.gz" in names):
        raise DataError(f"{directory} holds {both[0]} and {both[0]}.gz; remove one of them")
    return tars


def index_tars(tars: list[Path], cache: Path) -> tuple[list[ShardEntry], np.ndarray]:
    """Find the documents of ``tars``; what is known from an earlier call is not searched again.

    Returns:
        An entry for each tar that has documents, and the tokens of each document: ``[documents]`` int64.

    Raises:
        DataError: A tar is unreadable, or none has documents.
    """
    kept = cache / "tar-index"
    entries: list[ShardEntry] = []
    lengths: list[np.ndarray] = []
    reported = time.monotonic()
    for done, path in enumerate(tars, 1):
        try:
            entry, found = _index_tar(path, kept)
        except OSError as error:
            raise DataError(
                f"{path} cannot be indexed ({error}); make it readable and the cache {cache} writable, or set "
                "cache_dir to another directory"
            ) from error
        if entry.documents:
            entries.append(entry)
            lengths.append(found)
        else:
            log.warning("%s holds no documents", path)
        if time.monotonic() - reported >= _REPORT_SECONDS:
            log.info("%s: %d of %d tars indexed", path.parent, done, len(tars))
            reported = time.monotonic()
    if not entries:
        raise DataError(f"{tars[0].parent}: its {len(tars)} tars hold no documents; give tars of token ids")
    return entries, np.concatenate(lengths)


def _index_tar(path: Path, kept: Path) -> tuple[ShardEntry, np.ndarray]:
    """The tar's entry and its documents' lengths."""
    kept.mkdir(parents=True, exist_ok=True)
    stat = path.stat()
    identity = (_VERSION, str(path.resolve()), stat.st_size, stat.st_mtime_ns)
    name = f"{path.name}-{blake2b(repr(identity).encode(), digest_size=8).hexdigest()}"
    members, summary = kept / (name + MEMBERS_SUFFIX), kept / f"{name}.json"
    # The processes of a machine all come here at once; one of them works.
    with acquire(kept / f"{name}.lock", wait=math.inf):
        try:
            return _known_entry(path, members, summary)
        except FileNotFoundError:
            log.info("indexing %s", path)
        except (DataError, ValueError, KeyError, TypeError) as error:
            log.warning("%s is damaged (%s); indexing %s again", summary, error, path)
        _keep(path, members, summary)
        return _known_entry(path, members, summary)


def _known_entry(path: Path, members: Path, summary: Path) -> tuple[ShardEntry, np.ndarray]:
    known = read_json(summary)
    rows = read_members(members, known["documents"])
    packed = FileEntry(path.name, path.stat().st_size) if path.suffix == ".gz" else None
    entry = ShardEntry(
        raw=FileEntry(path.name.removesuffix(".gz"), known["bytes"], known["hashes"]),
        packed=packed,
        compression="gz" if packed else None,
        documents=known["documents"],
        details=array_details(known) | {MEMBERS_PATH: str(members)},
    )
    return entry, rows[:, 1]


def _keep(path: Path, members: Path, summary: Path) -> None:
    """Walk the tar and write what is found."""
    unpacked = members.with_suffix(".unpacked") if path.suffix == ".gz" else None
    try:
        if unpacked is not None:
            _unpack(path, unpacked)
        raw = unpacked or path
        found = scan_tar(raw, shown=path)
        known = {
            "bytes": raw.stat().st_size,
            "hashes": {} if unpacked is None else {_HASH: hash_file(raw, _HASH)},
            "documents": len(found.rows),
            DTYPE: found.dtype,
            HAS_LOSS_MASK: bool((found.rows[:, 2] >= 0).any()),
        }
    finally:
        if unpacked is not None:
            unpacked.unlink(missing_ok=True)
    partial = members.with_suffix(f".{os.getpid()}.npy")
    np.save(partial, found.rows)
    partial.replace(members)
    write_durably(summary, json.dumps(known), fsync=False, many_writers=True)


def _unpack(source: Path, target: Path) -> None:
    try:
        with gzip.open(source) as packed, target.open("wb") as out:
            shutil.copyfileobj(packed, out, 1 << 20)
    except (OSError, EOFError, zlib.error) as error:
        if isinstance(error, OSError) and is_disk_error(error):
            raise
        raise DataError(f"{source} cannot be unpacked ({error}); restore it or write it again") from error
