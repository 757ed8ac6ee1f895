"""MDS shards: written by mosaicml-streaming, read by our own reader. The only file that imports ``streaming``.

It writes only: :mod:`statex_dist.data.storage.mds_format` reads.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import numpy as np

from statex_dist.bare_package import import_from_bare
from statex_dist.data.storage.shards import LOSS_MASK, TOKENS
from statex_dist.errors import ConfigError, DataError

_HASH = "xxh64"
# Offsets inside a shard are uint32 and streaming lets them wrap, so the bound is ours to keep.
_MAX_SHARD_BYTES = 1 << 31


def has_streaming() -> bool:
    """Return whether mosaicml-streaming is installed (the writer and cloud storage need it)."""
    return importlib.util.find_spec("streaming") is not None


def load_streaming() -> ModuleType:
    """Import and return ``streaming.base`` without running ``streaming/__init__``, which imports torchvision.

    Also set ``LOCAL_WORLD_SIZE`` for streaming where the deepspeed launcher does not (it sets ``LOCAL_SIZE``): without
    it every rank believes to be the local leader (streaming issue 717).

    Raises:
        ConfigError: mosaicml-streaming is not installed.
    """
    if "LOCAL_SIZE" in os.environ:
        os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ["LOCAL_SIZE"])
    if not has_streaming():
        raise ConfigError(
            "writing MDS and reading cloud storage need mosaicml-streaming: "
            "pip install --no-deps mosaicml-streaming==0.13.0"
        )
    return import_from_bare("streaming.base")


class MdsShardWriter:
    """Writes documents as MDS shards ``shard.00000.mds[.zstd]``, ... and ``index.json``.

    Args:
        directory: Existing empty directory.
        dtype: ``"uint16"`` or ``"uint32"``.
        loss_mask: Whether to write the ``loss_mask`` column.
        compression: ``"none"`` or ``"zstd"``.
        shard_bytes: Upper limit of a raw shard (one longer document still makes a shard of its own).

    Attributes:
        shard_documents: Documents of each shard; complete after :meth:`finish`.
    """

    def __init__(self, directory: Path, *, dtype: str, loss_mask: bool, compression: str, shard_bytes: int):
        if not 1 <= shard_bytes <= _MAX_SHARD_BYTES:
            raise ConfigError(f"shard size {shard_bytes} bytes is not in 1..{_MAX_SHARD_BYTES} (2 GiB)")
        columns = {TOKENS: f"ndarray:{dtype}"} | ({LOSS_MASK: "ndarray:uint8"} if loss_mask else {})
        self._dtype = np.dtype(dtype)
        self._mask = loss_mask
        self._documents = 0
        self.shard_documents: list[int] = []
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
        if len(self._writer.shards) > len(self.shard_documents):
            self.shard_documents.append(self._documents)
            self._documents = 0
        self._documents += 1

    def finish(self) -> None:
        """Write the last shard and the index."""
        self._writer.finish()
        self.shard_documents.append(self._documents)

    def abort(self) -> None:
        """End the writer's threads without writing more."""
        self._writer.cancel_future_jobs()
