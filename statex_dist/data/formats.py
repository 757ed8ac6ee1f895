"""Which format a dataset directory has: the one place that knows all stores."""

from __future__ import annotations

from pathlib import Path

from statex_dist.data.mds import MdsStore
from statex_dist.data.store import ShardStore, read_manifest
from statex_dist.errors import DataError


def open_store(path: str | Path, *, cache_dir: str | Path | None = None) -> ShardStore:
    """Open a prepared dataset, recognising its format.

    Args:
        path: Directory that ``statex prepare`` or streaming's ``MDSWriter`` wrote.
        cache_dir: Where shards that exist only compressed are unpacked (see :class:`MdsStore`).

    Raises:
        DataError: The directory is missing, empty, of an unknown format, or its index or manifest is damaged.
    """
    directory = Path(path)
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
    if not (directory / "index.json").is_file():
        raise DataError(f"dataset {directory} has no index.json; give the directory that `statex prepare` wrote")
    return MdsStore(directory, manifest=read_manifest(directory), cache_dir=cache_dir)
