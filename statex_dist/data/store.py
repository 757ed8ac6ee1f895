"""Shards of tokenised documents behind one interface, whatever the file format.

A document is a sequence of token ids that ends with EOS; a shard is a list of documents; a store is a list of shards.
The planner needs only the lengths, the loader only slices, so any format with random access can stand behind
:class:`ShardStore` (:mod:`statex_dist.data.mds` does; :class:`MemoryStore` holds documents in memory).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from statex_dist.errors import DataError

MANIFEST_NAME = "manifest.json"
MANIFEST_VERSION = 1


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of tokens of one document.

    Attributes:
        tokens: ``[n]`` unsigned or signed integers, possibly a read-only view of the shard.
        loss_mask: ``[n]`` uint8, 1 where the token is a target to learn; ``None`` where all are.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetManifest:
    """What ``prepare`` says about a dataset, in ``manifest.json`` beside the index; written last.

    Attributes:
        version: Version of this file's layout.
        format: Shard format, ``"mds"``.
        tokenizer: What was given as tokenizer (``"bytes"`` or a directory; a hint, the hash decides).
        tokenizer_hash: :attr:`Tokenizer.hash`.
        vocab_size: One more than the largest id that may occur.
        eos_token_id: Id that ends every document.
        documents: Number of documents.
        tokens: Number of tokens, EOS included.
        dtype: ``"uint16"`` or ``"uint32"``.
        loss_mask: Whether the shards have a ``loss_mask`` column.
        seed: Seed of the document shuffle.
        shard_tokens: Tokens of each shard, so that a plan needs no file but this one.
        length_histogram: Number of documents by length: entry ``k`` counts ``2**k <= n < 2**(k + 1)``.
    """

    version: int = MANIFEST_VERSION
    format: str
    tokenizer: str
    tokenizer_hash: str
    vocab_size: int
    eos_token_id: int
    documents: int
    tokens: int
    dtype: str
    loss_mask: bool
    seed: int
    shard_tokens: list[int]
    length_histogram: list[int]

    def write(self, directory: Path) -> None:
        """Write the manifest into ``directory``; the caller makes the directory durable."""
        (directory / MANIFEST_NAME).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


class ShardStore(Protocol):
    """Random access to tokenised documents.

    Attributes:
        num_shards: Number of shards.
        fingerprint: Hex digest of the data; a saved loader state is refused for any other.
        has_loss_mask: Whether some document carries a loss mask.
        manifest: What ``prepare`` wrote, or ``None`` for shards of other origin.
    """

    @property
    def num_shards(self) -> int: ...  # noqa: D102 - documented by the class

    @property
    def fingerprint(self) -> str: ...  # noqa: D102

    @property
    def has_loss_mask(self) -> bool: ...  # noqa: D102

    @property
    def manifest(self) -> DatasetManifest | None: ...  # noqa: D102

    def lengths(self, shard: int) -> np.ndarray:
        """Return the tokens of each document of ``shard``, EOS included: ``[documents]`` int64."""
        ...

    def num_tokens(self, shard: int) -> int:
        """Return ``lengths(shard).sum()``, without opening the shard where the manifest knows it."""
        ...

    def read(self, shard: int, i: int, start: int, stop: int) -> Piece:
        """Return tokens ``start..stop`` of document ``i`` of ``shard``.

        Raises:
            DataError: The shard's file is missing or damaged.
        """
        ...


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

    def lengths(self, shard: int) -> np.ndarray:
        """Return the tokens of each document of ``shard``: ``[documents]`` int64."""
        return self._lengths[shard]

    def num_tokens(self, shard: int) -> int:
        """Return the tokens of ``shard``."""
        return int(self._lengths[shard].sum())

    def read(self, shard: int, i: int, start: int, stop: int) -> Piece:
        """Return tokens ``start..stop`` of document ``i`` of ``shard``."""
        mask = None if self._masks is None else self._masks[shard][i][start:stop]
        return Piece(self._shards[shard][i][start:stop], mask)


def read_manifest(directory: Path) -> DatasetManifest | None:
    """Return the manifest of ``directory``, or ``None`` where there is none (shards not made by ``prepare``).

    Raises:
        DataError: It is there but is not a manifest that this version reads.
    """
    path = directory / MANIFEST_NAME
    if not path.exists():
        return None
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is unreadable: {error}; prepare the dataset again") from error
    names = {field.name for field in fields(DatasetManifest)}
    if not isinstance(content, dict) or content.get("version") != MANIFEST_VERSION:
        found = content.get("version") if isinstance(content, dict) else type(content).__name__
        raise DataError(f"{path}: version {found} is not the supported {MANIFEST_VERSION}; prepare the dataset again")
    if set(content) != names:
        wrong = ", ".join(sorted(set(content) ^ names))
        raise DataError(f"{path}: missing or unknown keys: {wrong}; prepare the dataset again")
    return DatasetManifest(**content)


def sequential_documents(store: ShardStore) -> Iterator[Piece]:
    """Yield every whole document in stored order: what evaluation reads."""
    for shard in range(store.num_shards):
        for i, length in enumerate(store.lengths(shard).tolist()):
            yield store.read(shard, i, 0, length)
