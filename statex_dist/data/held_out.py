"""A share of a data set's documents that training leaves out, and validation reads."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

from statex_dist.data.manifest import DatasetManifest
from statex_dist.data.store import DocumentSlice, ShardStore


class HeldOut:
    """One side of a data set that is divided by document; a document of the other side has no tokens here.

    Which documents are held out depends on nothing but their shard, their place in it and the share, so that it is the
    same for any number of ranks, any seed and after a resume. A larger share holds out the documents of a smaller one
    too. Documents keep their numbers.

    Args:
        store: The whole data set.
        share: Share of the documents that is held out.
        held: Whether this is what is held out, or the rest.
    """

    def __init__(self, store: ShardStore, share: float, *, held: bool):
        self._store, self._share, self._held = store, share, held
        self.num_shards = store.num_shards
        self.has_loss_mask = store.has_loss_mask
        self.manifest: DatasetManifest | None = store.manifest
        side = "the" if held else "without the"
        self.fingerprint = f"{store.fingerprint}, {side} share eval.held_out={share:g}"

    def name(self, shard: int) -> str:
        """Return what to call ``shard`` in a message."""
        return self._store.name(shard)

    def lengths(self, shard: int) -> np.ndarray:
        """Return the tokens of each document of ``shard`` on this side, 0 for the others: ``[documents]`` int64."""
        lengths = self._store.lengths(shard)
        key = blake2b(repr(("held out", shard)).encode(), digest_size=16).digest()
        raw = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(len(lengths))
        chosen = raw / 2.0**64 < self._share
        return np.where(chosen if self._held else ~chosen, lengths, 0)

    def num_tokens(self, shard: int) -> int:
        """Return the tokens of ``shard`` on this side."""
        return int(self.lengths(shard).sum())

    def read(self, shard: int, i: int, start: int, stop: int) -> DocumentSlice:
        """Return tokens ``start..stop`` of document ``i`` of ``shard``."""
        return self._store.read(shard, i, start, stop)

    def prefetch(self, shards: Sequence[int], share: float = 1.0) -> None:
        """Begin to fetch ``shards``."""
        self._store.prefetch(shards, share)
