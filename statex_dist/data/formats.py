"""Which format a dataset has: the one place that knows all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from statex_dist.data.disk_store import DiskStore, fingerprint
from statex_dist.data.files import DatasetFiles, LocalFiles, default_cache_dir, write_atomically
from statex_dist.data.manifest import (
    LENGTHS_NAME,
    MANIFEST_NAME,
    DatasetManifest,
    pack_lengths,
    parse_manifest,
    read_lengths,
)
from statex_dist.data.mds_format import INDEX_NAME, MdsShard, read_index
from statex_dist.data.shards import LOSS_MASK, OpenShard, ShardEntry
from statex_dist.errors import DataError

OpenFunction = Callable[[Path, ShardEntry], OpenShard]


def open_store(path: str | Path, *, cache_dir: str | Path | None = None) -> DiskStore:
    """Open a dataset of tokenised documents, recognising its format.

    Args:
        path: Directory that ``statex prepare`` or streaming's ``MDSWriter`` wrote.
        cache_dir: Where shards that exist only compressed are unpacked; default ``$XDG_CACHE_HOME/statex`` or
            ``~/.cache/statex``.

    Raises:
        DataError: It is missing, empty, of an unknown format, or its index or manifest is damaged.
    """
    directory = Path(path)
    _check_directory(directory)
    cache = Path(cache_dir or default_cache_dir())
    files = LocalFiles(directory, cache)
    found = files.small(INDEX_NAME)
    if found is None:
        raise DataError(f"dataset {directory} has no {INDEX_NAME}; give the directory that `statex prepare` wrote")
    entries = read_index(found.read_bytes(), str(directory / INDEX_NAME))
    has_loss_mask = any(LOSS_MASK in entry.details["column_names"] for entry in entries)
    manifest = _manifest(files)
    if manifest is not None and manifest.shard_documents != [entry.documents for entry in entries]:
        raise DataError(
            f"{directory}: {MANIFEST_NAME} counts {len(manifest.shard_documents)} shards of {manifest.documents} "
            f"documents, the index {len(entries)} of {sum(entry.documents for entry in entries)}; prepare the dataset "
            "again"
        )
    lengths = _lengths(files, entries, MdsShard, manifest, cache)
    return DiskStore(files, entries, MdsShard, lengths=lengths, has_loss_mask=has_loss_mask, manifest=manifest)


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
    return None if found is None else parse_manifest(found.read_bytes(), f"{files.origin}/{MANIFEST_NAME}")


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
    kept = cache / f"lengths-{fingerprint(entries, files.origin)}.npy"
    if kept.exists():
        lengths = np.load(kept, allow_pickle=False)
        if lengths.shape == (documents,):
            return lengths
    parts = [open_shard(files.fetch(entry), entry).lengths for entry in entries]
    lengths = np.concatenate([*parts, np.zeros(0, np.int64)])
    write_atomically(kept, pack_lengths(lengths))
    return lengths
