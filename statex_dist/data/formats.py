"""Which format a dataset has: the one place that knows all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from statex_dist.checkpoint.json_file import MAX_JSON_BYTES, read_bytes
from statex_dist.data.manifest import (
    LENGTHS_NAME,
    MANIFEST_NAME,
    DatasetManifest,
    pack_lengths,
    parse_manifest,
    read_lengths,
)
from statex_dist.data.storage.cache import ShardCache
from statex_dist.data.storage.disk_store import DiskStore, fetch_and_open, fingerprint
from statex_dist.data.storage.files import DatasetFiles, LocalFiles, default_cache_dir, open_files
from statex_dist.data.storage.mds import INDEX_NAME as MDS_INDEX_NAME
from statex_dist.data.storage.mds import MdsShard
from statex_dist.data.storage.mds import read_index as read_mds_index
from statex_dist.data.storage.npy import read_npy
from statex_dist.data.storage.remote import RetryPolicy
from statex_dist.data.storage.shards import LOSS_MASK, MappedShard, ShardEntry
from statex_dist.data.storage.tar_format import HAS_LOSS_MASK, TarShard, find_tars, index_tars
from statex_dist.data.storage.tar_format import INDEX_NAME as TAR_INDEX_NAME
from statex_dist.data.storage.tar_format import read_index as read_tar_index
from statex_dist.durable.files import write_durably
from statex_dist.errors import DataError, reason

OpenFunction = Callable[[Path, ShardEntry], MappedShard]

# A few hundred bytes for each shard.
_MAX_INDEX_BYTES = 10 * MAX_JSON_BYTES


@dataclass(frozen=True, slots=True)
class _Index:
    """A dataset's facts before a shard is opened; ``lengths`` only where the search for the shards found them."""

    entries: Sequence[ShardEntry]
    open_shard: OpenFunction
    has_loss_mask: bool
    lengths: np.ndarray | None = None


def open_store(
    path: str | Path,
    *,
    cache_dir: str | Path | None = None,
    cache_limit: int | None = None,
    download_retries: int = 4,
    download_timeout: float = 60.0,
) -> DiskStore:
    """Open a dataset of tokenised documents, recognising its format.

    Args:
        path: Directory or URL (``s3://bucket/dir`` and so on) of what ``statex prepare`` or streaming's ``MDSWriter``
            wrote, or directory of tars such as webdataset's ``ShardWriter`` writes.
        cache_dir: Where shards from a URL, and those that exist only compressed, are kept; default
            ``$XDG_CACHE_HOME/statex`` or ``~/.cache/statex``.
        cache_limit: Bytes that the shards in ``cache_dir`` may take, or ``None``.
        download_retries: Further attempts after a download that failed.
        download_timeout: Seconds without a new byte after which a download has failed.

    Raises:
        ConfigError: The URL's scheme is not known or its package is missing, or an option is out of range.
        DataError: It is missing, empty, of an unknown format, or its index or manifest is damaged.
    """
    cache = ShardCache(Path(cache_dir or default_cache_dir()), cache_limit)
    files = open_files(path, cache, RetryPolicy(retries=download_retries, timeout=download_timeout))
    if isinstance(files, LocalFiles):
        _check_directory(files.directory)
    index = _index(files, cache.directory)
    entries = index.entries
    files.require_room(entries)
    manifest = None if index.lengths is not None else _manifest(files)
    if manifest is not None and manifest.shard_documents != [entry.documents for entry in entries]:
        raise DataError(
            f"{files.origin}: {MANIFEST_NAME} counts {len(manifest.shard_documents)} shards of {manifest.documents} "
            f"documents, the index {len(entries)} of {sum(entry.documents for entry in entries)}; prepare the dataset "
            "again"
        )
    lengths = index.lengths
    if lengths is None:
        lengths = _lengths(files, entries, index.open_shard, manifest, cache.directory)
    return DiskStore(
        files, entries, index.open_shard, lengths=lengths, has_loss_mask=index.has_loss_mask, manifest=manifest
    )


def _index(files: DatasetFiles, cache: Path) -> _Index:
    """The dataset's shards, whatever its format."""
    if found := files.small(MDS_INDEX_NAME):
        entries = read_mds_index(*_content(files, found, MDS_INDEX_NAME, _MAX_INDEX_BYTES))
        return _Index(entries, MdsShard, any(LOSS_MASK in entry.details["column_names"] for entry in entries))
    if found := files.small(TAR_INDEX_NAME):
        entries = read_tar_index(*_content(files, found, TAR_INDEX_NAME, _MAX_INDEX_BYTES))
        return _Index(entries, TarShard, any(entry.details[HAS_LOSS_MASK] for entry in entries))
    if isinstance(files, LocalFiles) and (tars := find_tars(files.directory)):
        entries, lengths = index_tars(tars, cache)
        return _Index(entries, TarShard, any(entry.details[HAS_LOSS_MASK] for entry in entries), lengths)
    raise DataError(
        f"dataset {files.origin} has no {MDS_INDEX_NAME} (MDS), no {TAR_INDEX_NAME} (tar) and no *.tar or *.tar.gz "
        "(webdataset, in a directory); give the directory that `statex prepare` wrote"
    )


def _check_directory(directory: Path) -> None:
    if not directory.exists():
        if directory.parent.is_dir() and any(
            p.name.startswith(f".{directory.name}.old-") for p in directory.parent.iterdir()
        ):
            raise DataError(
                f"dataset {directory} does not exist: an overwrite of it was killed; `statex prepare` into it again "
                "brings back the old one"
            )
        raise DataError(f"dataset {directory} does not exist; make it with `statex prepare INPUT --out {directory}`")
    if not directory.is_dir():
        raise DataError(f"dataset {directory} is a file; give the directory that `statex prepare` wrote")
    if not any(directory.iterdir()):
        raise DataError(f"dataset {directory} is empty; make it with `statex prepare INPUT --out {directory}`")


def _manifest(files: DatasetFiles) -> DatasetManifest | None:
    """The manifest, or ``None`` where there is none: shards that ``prepare`` did not make."""
    found = files.small(MANIFEST_NAME)
    return None if found is None else parse_manifest(*_content(files, found, MANIFEST_NAME, MAX_JSON_BYTES))


def _content(files: DatasetFiles, found: Path, name: str, most: int) -> tuple[bytes, str]:
    """Return the bytes of a file of the dataset, and its name in messages."""
    origin = f"{files.origin}/{name}"
    try:
        return read_bytes(found, most=most), origin
    except (OSError, ValueError) as error:
        raise DataError(f"{origin} cannot be read: {reason(error)}; prepare the dataset again") from None


def _lengths(
    files: DatasetFiles,
    entries: Sequence[ShardEntry],
    open_shard: OpenFunction,
    manifest: DatasetManifest | None,
    cache: Path,
) -> np.ndarray:
    """All documents' lengths: from beside the manifest, or gathered once from the shards themselves and kept."""
    documents = sum(entry.documents for entry in entries)
    if manifest is not None:
        found = files.small(LENGTHS_NAME)
        if found is None:
            raise DataError(f"{files.origin} has no {LENGTHS_NAME}; restore it or prepare the dataset again")
        return read_lengths(found, documents, manifest.lengths_hash)
    kept = cache / f"lengths-{fingerprint(entries, _identity(files, entries))}.npy"
    with contextlib.suppress(OSError, ValueError):  # missing or damaged: gathered again
        return read_npy(kept, "uint32", (documents,))
    files.prefetch(entries)
    parts = [fetch_and_open(files, entry, open_shard)[1].lengths for entry in entries]
    lengths = np.concatenate([*parts, np.zeros(0, np.int64)])
    with contextlib.suppress(OSError):  # kept only to spare the same work the next time
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_durably(kept, pack_lengths(lengths), fsync=False, many_writers=True)
    return lengths


def _identity(files: DatasetFiles, entries: Sequence[ShardEntry]) -> str:
    """Return the place and, for local files without hashes, their times: they complete the sizes and hashes."""
    if not isinstance(files, LocalFiles):
        return files.origin
    changed: list[int] = []
    for entry in entries:
        for file in (entry.raw, entry.packed):
            if file is not None and not entry.raw.hashes:
                with contextlib.suppress(OSError):  # a shard that is missing is reported when it is fetched
                    changed.append((files.directory / file.name).stat().st_mtime_ns)
    return repr((files.origin, changed)) if changed else files.origin
