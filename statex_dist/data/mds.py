"""MDS shards: written by mosaicml-streaming, read by our own reader. The only file that imports ``streaming``.

A shard is random access from one memory map (:mod:`statex_dist.data.mds_format`), so streaming's reader is not needed.
It is not used either: when a shard is missing or damaged, its iteration ends early without an exception (0.13.0),
which would quietly train on less.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import threading
from collections import OrderedDict
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from statex_dist.data import streaming_hook
from statex_dist.data.mds_format import LOSS_MASK, TOKENS, MdsShard, decompress, fingerprint, read_index, verify_file
from statex_dist.data.store import DatasetManifest, Piece
from statex_dist.errors import ConfigError, DataError

log = logging.getLogger(__name__)

_HASH = "xxh64"
_MAX_OPEN_SHARDS = 256
# Offsets inside a shard are uint32 and streaming lets them wrap, so the bound is ours to keep.
_MAX_SHARD_BYTES = 1 << 31


def has_streaming() -> bool:
    """Return whether mosaicml-streaming is installed (only the writer needs it)."""
    return importlib.util.find_spec("streaming") is not None


def load_streaming() -> ModuleType:
    """Import and return ``streaming.base`` without running ``streaming/__init__`` (see :mod:`streaming_hook`).

    Also gives streaming the ``LOCAL_WORLD_SIZE`` that the deepspeed launcher does not set (it sets ``LOCAL_SIZE``);
    without it every rank believes to be the local leader (streaming issue 717).

    Raises:
        ConfigError: mosaicml-streaming is not installed.
    """
    if "LOCAL_SIZE" in os.environ:
        os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ["LOCAL_SIZE"])
    if not has_streaming():
        raise ConfigError("writing MDS needs mosaicml-streaming: pip install --no-deps mosaicml-streaming==0.13.0")
    streaming_hook.install()
    return importlib.import_module("streaming.base")


class MdsShardWriter:
    """Writes documents as MDS shards ``shard.00000.mds[.zstd]``, ... and ``index.json``.

    Args:
        directory: Existing empty directory.
        dtype: ``"uint16"`` or ``"uint32"``.
        loss_mask: Whether to write the ``loss_mask`` column.
        compression: ``"none"`` or ``"zstd"``.
        shard_bytes: Upper limit of a raw shard (one longer document still makes a shard of its own).

    Attributes:
        shard_tokens: Tokens of each shard; complete after :meth:`finish`.
    """

    def __init__(self, directory: Path, *, dtype: str, loss_mask: bool, compression: str, shard_bytes: int):
        if not 1 <= shard_bytes <= _MAX_SHARD_BYTES:
            raise ConfigError(f"shard size {shard_bytes} bytes is not in 1..{_MAX_SHARD_BYTES} (2 GiB)")
        columns = {TOKENS: f"ndarray:{dtype}"} | ({LOSS_MASK: "ndarray:uint8"} if loss_mask else {})
        self._dtype = np.dtype(dtype)
        self._mask = loss_mask
        self._tokens = 0
        self.shard_tokens: list[int] = []
        self._writer = load_streaming().MDSWriter(
            out=str(directory),
            columns=columns,
            compression=None if compression == "none" else compression,
            hashes=[_HASH],
            size_limit=shard_bytes,
        )

    def write(self, tokens: np.ndarray, loss_mask: np.ndarray | None = None) -> None:
        """Append a document ``[n]`` (``n >= 1``) and, if the column exists, its mask ``[n]`` (default: all ones).

        Raises:
            DataError: The document cannot fit a shard.
        """
        if tokens.nbytes * 2 > _MAX_SHARD_BYTES:
            raise DataError(f"a document of {len(tokens)} tokens does not fit an MDS shard; split it")
        sample = {TOKENS: tokens.astype(self._dtype, copy=False)}
        if self._mask:
            sample[LOSS_MASK] = np.ones(len(tokens), np.uint8) if loss_mask is None else loss_mask
        self._writer.write(sample)
        if len(self._writer.shards) > len(self.shard_tokens):
            self.shard_tokens.append(self._tokens)
            self._tokens = 0
        self._tokens += len(tokens)

    def finish(self) -> None:
        """Write the last shard and the index."""
        self._writer.finish()
        self.shard_tokens.append(self._tokens)

    def abort(self) -> None:
        """End the writer's threads without writing more."""
        self._writer.cancel_future_jobs()


class MdsStore:
    """A :class:`~statex_dist.data.store.ShardStore` over a directory of MDS shards.

    Every shard file is checked (size, then the hashes in the index) when it is first opened. A shard that is there
    only compressed is unpacked once into the cache.

    Args:
        directory: Dataset directory with ``index.json``.
        manifest: Its manifest, if it has one.
        cache_dir: Directory for unpacked shards; default ``$XDG_CACHE_HOME/statex`` or ``~/.cache/statex``.

    Raises:
        DataError: The index is damaged or describes something other than tokens.
    """

    def __init__(
        self, directory: Path, *, manifest: DatasetManifest | None = None, cache_dir: str | Path | None = None
    ):
        self.directory = directory
        self.manifest = manifest
        self._shards = read_index(directory)
        self.num_shards = len(self._shards)
        self.has_loss_mask = any(LOSS_MASK in shard["column_names"] for shard in self._shards)
        self.fingerprint = fingerprint(self._shards)
        if manifest is not None and len(manifest.shard_tokens) != self.num_shards:
            raise DataError(
                f"{directory}: manifest.json counts {len(manifest.shard_tokens)} shards, index.json {self.num_shards}; "
                "prepare the dataset again"
            )
        default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "statex"
        self._cache = Path(cache_dir or default) / self.fingerprint
        self._open: OrderedDict[int, MdsShard] = OrderedDict()
        self._checked: set[Path] = set()
        # The loader's thread and a caller of lengths() may open shards at the same time.
        self._lock = threading.RLock()

    def lengths(self, shard: int) -> np.ndarray:
        """Return the tokens of each document of ``shard``: ``[documents]`` int64."""
        return self._shard(shard).lengths

    def num_tokens(self, shard: int) -> int:
        """Return the tokens of ``shard``: from the manifest, else by opening it."""
        if self.manifest is not None:
            return self.manifest.shard_tokens[shard]
        return int(self.lengths(shard).sum())

    def read(self, shard: int, i: int, start: int, stop: int) -> Piece:
        """Return tokens ``start..stop`` of document ``i``, as views of the mapped shard."""
        return self._shard(shard).read(i, start, stop)

    def _shard(self, index: int) -> MdsShard:
        with self._lock:
            shard = self._open.get(index)
            if shard is None:
                shard = self._open_shard(index)
                self._open[index] = shard
                if len(self._open) > _MAX_OPEN_SHARDS:
                    self._open.popitem(last=False)
            else:
                self._open.move_to_end(index)
            return shard

    def _open_shard(self, index: int) -> MdsShard:
        info = self._shards[index]
        raw, packed = info["raw_data"], info.get("zip_data")
        path = self.directory / raw["basename"]
        if path.exists():
            self._check(path, raw)
        elif packed is not None and (self.directory / packed["basename"]).exists():
            path = self._unpack(self.directory / packed["basename"], info)
        else:
            wanted = raw["basename"] + (f" or {packed['basename']}" if packed else "")
            raise DataError(f"{self.directory}: shard {wanted} is missing; restore it or prepare the dataset again")
        shard = MdsShard(path, info)
        if self.manifest is not None and int(shard.lengths.sum()) != self.manifest.shard_tokens[index]:
            raise DataError(
                f"{path}: {int(shard.lengths.sum())} tokens, but manifest.json says "
                f"{self.manifest.shard_tokens[index]}; the files are not of one dataset: prepare it again"
            )
        return shard

    def _check(self, path: Path, info: dict[str, Any]) -> None:
        if path not in self._checked:
            verify_file(path, info)
            self._checked.add(path)

    def _unpack(self, source: Path, info: dict[str, Any]) -> Path:
        raw = info["raw_data"]
        target = self._cache / raw["basename"]
        if target.exists():
            try:
                self._check(target, raw)
                return target
            except DataError as error:
                log.warning("%s; unpacking %s again", error, source)
        self._check(source, info["zip_data"])
        log.info("unpacking %s to %s", source, target.parent)
        try:
            content = decompress(str(info["compression"]), source.read_bytes())
        except Exception as error:
            # Each codec has its own exception type; whatever it is, the file is not what the index says.
            raise DataError(
                f"{source} cannot be unpacked ({error}); restore it or prepare the dataset again"
            ) from error
        target.parent.mkdir(parents=True, exist_ok=True)
        # Ranks of one machine may unpack the same shard at once: each writes its own file, the last rename wins.
        partial = target.with_name(f"{target.name}.{os.getpid()}.{threading.get_ident()}")
        partial.write_bytes(content)
        partial.replace(target)
        self._check(target, raw)
        return target
