"""Reading the pieces of a pack and laying them out as tensors."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from statex_dist.batch import IGNORE_INDEX, Origin, PackedBatch
from statex_dist.data.store import DocumentSlice, ShardStore
from statex_dist.errors import CorruptShardError, DataError, ShardError, refusal

log = logging.getLogger(__name__)


PieceSpec = tuple[int, int, int, int, int]
"""``(shard, document, start, stop, document length)``."""


@dataclass(frozen=True, slots=True)
class PackSpec:
    """The content of one pack and its place in the stream.

    Attributes:
        source: Name of the source.
        pieces: The pieces, in order.
        origins: Where the first of them come from.
        seq_len: Tokens of the pack.
        carried: See :class:`~statex_dist.batch.PackedBatch`.
        continues: See :class:`~statex_dist.batch.PackedBatch`.
        state: The loader's state after this pack's global step.
    """

    source: str
    pieces: list[PieceSpec]
    origins: tuple[Origin, ...]
    seq_len: int
    carried: bool
    continues: bool
    state: dict[str, Any]


@dataclass(frozen=True, slots=True)
class PackParts:
    """The data that was read for one pack; small, because workers send it to the main process.

    Attributes:
        tokens: ``[used]`` ids of all pieces, in the type that they are stored in.
        loss_mask: ``[used]`` uint8, or ``None`` where all targets are learned.
        following: For each piece whose document continues after it: the piece's number and the next id, or
            :data:`IGNORE_INDEX` if that id is not to be learned.
        lost_tokens: Tokens of damaged shards; padding replaces them.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray | None
    following: list[tuple[int, int]]
    lost_tokens: int


class PackReader:
    """Reads the pieces of packs from the stores of all sources."""

    def __init__(self, stores: dict[str, ShardStore], *, pad_id: int, vocab_size: int | None, skip_corrupt: bool):
        self._stores = stores
        self._pad_id = pad_id
        self._vocab_size = vocab_size
        self._skip_corrupt = skip_corrupt
        self._lost: set[tuple[str, int]] = set()

    def read(self, source: str, pieces: list[PieceSpec]) -> PackParts:
        """Return what a pack of ``pieces`` needs.

        Raises:
            ShardError: A shard is missing or damaged, and is not to be skipped.
            DataError: An id is outside the vocabulary.
        """
        read = [self._read(source, shard, document, start, stop) for shard, document, start, stop, _ in pieces]
        tokens = np.concatenate([piece.tokens for piece in read])
        self._check_ids(tokens, source, pieces)
        loss_mask = None
        if any(piece.loss_mask is not None for piece in read):
            loss_mask = np.concatenate(
                [np.ones(len(p.tokens), np.uint8) if p.loss_mask is None else p.loss_mask for p in read]
            )
        following = []
        for number, (shard, document, _, stop, length) in enumerate(pieces):
            if stop < length:
                after = self._read(source, shard, document, stop, stop + 1)
                learned = after.loss_mask is None or bool(after.loss_mask[0])
                self._check_ids(after.tokens, source, [(shard, document, stop, stop + 1, length)])
                following.append((number, int(after.tokens[0]) if learned else IGNORE_INDEX))
        lost = sum(stop - start for shard, _, start, stop, _ in pieces if (source, shard) in self._lost)
        return PackParts(tokens, loss_mask, following, lost)

    def _read(self, source: str, shard: int, document: int, start: int, stop: int) -> DocumentSlice:
        if (source, shard) not in self._lost:
            try:
                return self._stores[source].read(shard, document, start, stop)
            except CorruptShardError as error:
                where = f"source {source}, document {document}"
                if not self._skip_corrupt:
                    raise CorruptShardError(f"{where}: {error}") from error
                # The plan stays the same, so all ranks continue with the same packs, whichever rank reads the shard.
                log.warning("skipped a shard (%s): %s", where, error)
                self._lost.add((source, shard))
            except OSError as error:
                name = self._stores[source].name(shard)
                raise ShardError(f"source {source}, document {document}: {name}: {refusal(error)}") from error
        return DocumentSlice(np.full(stop - start, self._pad_id, np.uint32), np.zeros(stop - start, np.uint8))

    def _check_ids(self, ids: np.ndarray, source: str, pieces: list[PieceSpec]) -> None:
        if self._vocab_size is None or not len(ids):
            return
        if ids.max() < self._vocab_size and (ids.dtype.kind == "u" or ids.min() >= 0):
            return
        at = int(np.flatnonzero((ids < 0) | (ids >= self._vocab_size))[0])
        ends = np.cumsum([stop - start for _, _, start, stop, _ in pieces])
        shard, document, _, stop, _ = pieces[int(np.searchsorted(ends, at, side="right"))]
        place = stop - int(ends[np.searchsorted(ends, at, side="right")]) + at
        raise DataError(
            f"source {source}, shard {self._stores[source].name(shard)}: document {document} has the id {ids[at]} at "
            f"token {place}, outside the model's vocabulary of {self._vocab_size}; prepare the data with the model's "
            "tokenizer"
        )


def lay_out(specs: Sequence[PackSpec], parts: Sequence[PackParts], pad_id: int) -> list[PackedBatch]:
    """Lay packs of one length out as tensors, all at once: the cost is per token, not per pack.

    A document of ``n`` tokens gives ``n - 1`` targets: its EOS has none. Where a document continues after a piece, the
    piece's last token keeps its true target. A target whose ``loss_mask`` is 0 is ignored.

    Returns:
        One batch for each pack; their tensors are parts of common ones.
    """
    seq_len, total = specs[0].seq_len, len(specs) * specs[0].seq_len
    sizes: list[np.ndarray] = []
    for spec in specs:
        lengths = [stop - start for _, _, start, stop, _ in spec.pieces]
        padding = seq_len - sum(lengths)
        sizes.append(np.array([*lengths, padding] if padding else lengths, np.int64))
    ids = np.full(total, pad_id, np.int64)
    for row, part in enumerate(parts):
        ids[row * seq_len : row * seq_len + len(part.tokens)] = part.tokens

    segments = np.concatenate(sizes)
    ends = np.cumsum(segments)
    labels = np.empty(total, np.int64)
    labels[:-1] = ids[1:]
    labels[ends - 1] = IGNORE_INDEX
    positions = np.arange(total) - np.repeat(ends - segments, segments)
    numbers = np.concatenate([np.arange(len(part), dtype=np.int32) for part in sizes])
    seq_idx = np.repeat(numbers, segments)
    batches = []
    for row, (spec, part) in enumerate(zip(specs, parts, strict=True)):
        here = slice(row * seq_len, (row + 1) * seq_len)
        borders = np.concatenate([[0], np.cumsum(sizes[row])])
        used = len(part.tokens)
        row_labels = labels[here]
        row_labels[used:] = IGNORE_INDEX
        if part.loss_mask is not None:
            row_labels[: used - 1][part.loss_mask[1:] == 0] = IGNORE_INDEX
        for number, token in part.following:
            row_labels[borders[number + 1] - 1] = token
        batches.append(
            PackedBatch(
                input_ids=torch.from_numpy(ids[here])[None],
                labels=torch.from_numpy(row_labels)[None],
                position_ids=torch.from_numpy(positions[here])[None],
                cu_seqlens=torch.from_numpy(borders.astype(np.int32)),
                seq_idx=torch.from_numpy(seq_idx[here])[None],
                loader_state=spec.state,
                carried=spec.carried,
                continues=spec.continues,
                lost_tokens=part.lost_tokens,
                origins=spec.origins,
                num_pieces=len(spec.pieces),
                padding=seq_len - used,
            )
        )
    return batches
