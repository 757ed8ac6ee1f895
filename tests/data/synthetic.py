"""Small corpora made on the spot."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from statex_dist.data.storage.mds import MdsShardWriter
from statex_dist.data.storage.tar import WdsShardWriter
from statex_dist.data.store import MemoryStore, ShardStore

EOS = 256
PAD = 257


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
