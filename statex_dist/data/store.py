"""Shards of tokenised documents behind one interface, whatever the file format.

A document is a sequence of token ids that ends with EOS; a shard is a list of documents; a store is a list of shards.
The planner needs only the lengths, the loader only slices, so any format with random access can stand behind
:class:`ShardStore`: :class:`~statex_dist.data.storage.disk_store.DiskStore` for every format on disk or behind a URL.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from statex_dist.data.manifest import DatasetManifest


@dataclass(frozen=True, slots=True)
class DocumentSlice:
    """A run of tokens of one document.

    Attributes:
        tokens: ``[n]`` unsigned or signed integers, possibly a read-only view of the shard.
        loss_mask: ``[n]`` uint8, 1 where the token is a target to learn; ``None`` where all are.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray | None = None


class ShardStore(Protocol):
    """Random access to tokenised documents.

    Attributes:
        num_shards: Number of shards.
        fingerprint: Hex digest of the data; a saved loader state is refused for any other.
        has_loss_mask: Whether some document carries a loss mask.
        manifest: What ``prepare`` wrote, or ``None`` for shards of other origin.
    """

    num_shards: int
    fingerprint: str
    has_loss_mask: bool
    manifest: DatasetManifest | None

    def name(self, shard: int) -> str:
        """Return what to call ``shard`` in a message."""
        ...

    def lengths(self, shard: int) -> np.ndarray:
        """Return the tokens of each document of ``shard``, EOS included: ``[documents]`` int64. Opens no shard."""
        ...

    def num_tokens(self, shard: int) -> int:
        """Return ``lengths(shard).sum()``."""
        ...

    def read(self, shard: int, i: int, start: int, stop: int) -> DocumentSlice:
        """Return tokens ``start..stop`` of document ``i`` of ``shard``.

        Raises:
            CorruptShardError: The shard's file is missing or damaged where it comes from.
            ShardError: It cannot be fetched.
        """
        ...

    def prefetch(self, shards: Sequence[int], share: float = 1.0) -> None:
        """Begin to fetch ``shards`` in the background, in this order; what fails is raised when it is read.

        Args:
            shards: What will be read soon.
            share: How much of a cache that has a limit they may take: other stores use it too.
        """
        ...


def sequential_documents(store: ShardStore) -> Iterator[DocumentSlice]:
    """Yield every whole document in stored order: what evaluation reads."""
    for shard in range(store.num_shards):
        for i, length in enumerate(store.lengths(shard).tolist()):
            yield store.read(shard, i, 0, length)
