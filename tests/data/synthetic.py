"""Small corpora made on the spot."""

from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np

from statex_dist.data.manifest import DatasetManifest
from statex_dist.data.storage.mds import MdsShardWriter
from statex_dist.data.storage.tar import WdsShardWriter
from statex_dist.data.store import DocumentSlice, ShardStore

EOS = 256
PAD = 257


class MemoryStore:
    """Documents held in memory: synthetic data, probes and tests.

    Args:
        shards: For each shard its documents, each ``[n]`` integers that end with EOS.
        loss_masks: The same nesting of ``[n]`` uint8 masks, or ``None``.
    """

    def __init__(
        self, shards: Sequence[Sequence[np.ndarray]], loss_masks: Sequence[Sequence[np.ndarray]] | None = None
    ):
        self._shards = [[np.asarray(document) for document in shard] for shard in shards]
        self._masks = None
        if loss_masks is not None:
            self._masks = [[np.asarray(mask, np.uint8) for mask in shard] for shard in loss_masks]
        self._lengths = [np.array([len(document) for document in shard], np.int64) for shard in self._shards]
        digest = blake2b(digest_size=16)
        for shard in [*self._shards, *(self._masks or [])]:
            for array in shard:
                digest.update(f"{array.dtype} {len(array)} ".encode())
                digest.update(array.tobytes())
        self.fingerprint = digest.hexdigest()
        self.num_shards = len(self._shards)
        self.has_loss_mask = self._masks is not None
        self.manifest: DatasetManifest | None = None

    def name(self, shard: int) -> str:
        """Return what to call ``shard`` in a message."""
        return f"shard {shard}"

    def lengths(self, shard: int) -> np.ndarray:
        """Return the tokens of each document of ``shard``: ``[documents]`` int64."""
        return self._lengths[shard]

    def num_tokens(self, shard: int) -> int:
        """Return the tokens of ``shard``."""
        return int(self._lengths[shard].sum())

    def read(self, shard: int, i: int, start: int, stop: int) -> DocumentSlice:
        """Return tokens ``start..stop`` of document ``i`` of ``shard``."""
        mask = None if self._masks is None else self._masks[shard][i][start:stop]
        return DocumentSlice(self._shards[shard][i][start:stop], mask)

    def prefetch(self, shards: Sequence[int], share: float = 1.0) -> None:
        """There is nothing to fetch."""


def make_documents(lengths: Sequence[int], seed: int = 0) -> list[np.ndarray]:
    """Documents of the given lengths, EOS included, with distinguishable contents."""
    rng = np.random.default_rng(seed)
    return [np.append(rng.integers(0, 256, n - 1), EOS).astype(np.uint16) for n in lengths]


def memory_store(lengths: Sequence[int], shards: int = 3, masks: bool = False) -> MemoryStore:
    documents = make_documents(lengths)
    split = [documents[i::shards] for i in range(shards)]
    split = [shard for shard in split if shard]
    if not masks:
        return MemoryStore(split)
    rng = np.random.default_rng(1)
    return MemoryStore(split, [[rng.integers(0, 2, len(d)).astype(np.uint8) for d in shard] for shard in split])


def write_mds(directory: Path, documents: Sequence[np.ndarray], **options) -> Path:
    return _write(MdsShardWriter, directory, documents, {"shard_bytes": 4096} | options)


def write_tar(directory: Path, documents: Sequence[np.ndarray], **options) -> Path:
    return _write(WdsShardWriter, directory, documents, {"shard_bytes": 10240} | options)


def _write(writer_class, directory: Path, documents: Sequence[np.ndarray], options: dict) -> Path:
    directory.mkdir(parents=True)
    writer = writer_class(directory, **{"dtype": "uint16", "loss_mask": False, "compression": "none"} | options)
    for document in documents:
        writer.write(document)
    writer.finish()
    return directory


def assert_same(read: Sequence[np.ndarray], written: Sequence[np.ndarray]) -> None:
    assert len(read) == len(written)
    for a, b in zip(read, written, strict=True):
        np.testing.assert_array_equal(a, b)


def all_documents(store: ShardStore) -> list[np.ndarray]:
    return [
        store.read(shard, i, 0, int(n)).tokens.astype(np.int64)
        for shard in range(store.num_shards)
        for i, n in enumerate(store.lengths(shard))
    ]
