"""Tars that someone else wrote: no index lies beside them, so each is walked once and what was found is kept.

What is kept lies in ``tar-index/`` of the cache, by the tar's path, size and time of change: ``NAME-DIGEST.index.npy``,
the member index, and ``NAME-DIGEST.json``, written after it.
"""

from __future__ import annotations

import gzip
import json
import logging
import math
import os
import shutil
import time
import zlib
from hashlib import blake2b
from pathlib import Path

import numpy as np

from statex_dist.checkpoint.json_file import read_json
from statex_dist.data.storage.remote import is_disk_error
from statex_dist.data.storage.shards import FileEntry, ShardEntry, hash_file
from statex_dist.data.storage.tar_format import (
    DTYPE,
    HAS_LOSS_MASK,
    MEMBERS_PATH,
    MEMBERS_SUFFIX,
    array_details,
    read_members,
)
from statex_dist.data.storage.tar_members import scan_tar
from statex_dist.durable.files import write_durably
from statex_dist.durable.lock import acquire
from statex_dist.errors import DataError

log = logging.getLogger(__name__)

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

    Args:
        tars: What :func:`find_tars` returned, not empty.
        cache: Where to keep what is found.

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
