"""Reading the pieces of a pack and laying them out as tensors."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from statex_dist.data.store import Piece, ShardStore
from statex_dist.data.types import IGNORE_INDEX, PackedBatch
from statex_dist.errors import DataError, ShardError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PackSpec:
    """What one pack is made of.

    Attributes:
        source: Name of the source.
        pieces: ``(shard, document, start, stop, document length)`` of each piece, in order.
        seq_len: Tokens of the pack.
        carried: See :class:`~statex_dist.data.types.PackedBatch`.
        goes_on: See :class:`~statex_dist.data.types.PackedBatch`.
        state: The loader's state after this pack's global step.
    """

    source: str
    pieces: list[tuple[int, int, int, int, int]]
    seq_len: int
    carried: bool
    goes_on: bool
    state: dict[str, Any]


class PackBuilder:
    """Builds packs from the stores of all sources.

    Args:
        stores: The documents of each source.
        pad_id: Id of the positions behind the last piece.
        vocab_size: Bound of the ids; ``None`` for no check.
        skip_corrupt: Put padding in the place of a damaged shard's tokens, instead of raising.
    """

    def __init__(self, stores: dict[str, ShardStore], *, pad_id: int, vocab_size: int | None, skip_corrupt: bool):
        self._stores = stores
        self._pad_id = pad_id
        self._vocab_size = vocab_size
        self._skip_corrupt = skip_corrupt
        self._lost: set[tuple[str, int]] = set()

    def build(self, spec: PackSpec) -> PackedBatch:
        """Return the pack of ``spec``.

        A document of ``n`` tokens gives ``n - 1`` targets: its EOS has none. Where a document goes on behind a piece,
        the piece's last token keeps its true target, read from the document. A target whose ``loss_mask`` is 0 is
        ignored.

        Raises:
            ShardError: A shard is missing or damaged, and is not to be skipped.
            DataError: An id is outside the vocabulary.
        """
        store, pieces, seq_len = self._stores[spec.source], spec.pieces, spec.seq_len
        read = [self._read(spec.source, shard, document, start, stop) for shard, document, start, stop, _ in pieces]
        sizes = np.array([stop - start for _, _, start, stop, _ in pieces], np.int64)
        used = int(sizes.sum())
        ids = np.empty(seq_len, np.int64)
        np.concatenate([piece.tokens for piece in read], out=ids[:used], casting="same_kind")
        ids[used:] = self._pad_id
        self._check_ids(ids[:used], sizes, spec)

        labels = np.full(seq_len, IGNORE_INDEX, np.int64)
        labels[: used - 1] = ids[1:used]
        if store.has_loss_mask or any(piece.loss_mask is not None for piece in read):
            masks = [np.ones(len(p.tokens), np.uint8) if p.loss_mask is None else p.loss_mask for p in read]
            labels[: used - 1][np.concatenate(masks)[1:] == 0] = IGNORE_INDEX
        ends = np.cumsum(sizes)
        labels[ends - 1] = IGNORE_INDEX
        for end, (shard, document, _, stop, length) in zip(ends.tolist(), pieces, strict=True):
            if stop < length:
                following = self._read(spec.source, shard, document, stop, stop + 1)
                if following.loss_mask is None or following.loss_mask[0]:
                    labels[end - 1] = following.tokens[0]

        if used < seq_len:
            sizes = np.append(sizes, seq_len - used)
        borders = np.concatenate([[0], np.cumsum(sizes)])
        positions = np.arange(seq_len) - np.repeat(borders[:-1], sizes)
        segments = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
        lost = sum(stop - start for shard, _, start, stop, _ in pieces if (spec.source, shard) in self._lost)
        return PackedBatch(
            input_ids=torch.from_numpy(ids)[None],
            labels=torch.from_numpy(labels)[None],
            position_ids=torch.from_numpy(positions)[None],
            cu_seqlens=torch.from_numpy(borders.astype(np.int32)),
            seq_idx=torch.from_numpy(segments)[None],
            loader_state=spec.state,
            carried=spec.carried,
            goes_on=spec.goes_on,
            lost_tokens=lost,
        )

    def _read(self, source: str, shard: int, document: int, start: int, stop: int) -> Piece:
        if (source, shard) not in self._lost:
            try:
                return self._stores[source].read(shard, document, start, stop)
            except ShardError as error:
                if not self._skip_corrupt:
                    raise
                # The plan stays as it is, so every rank goes on with the same packs, whoever can read the shard.
                log.warning("skipped a shard: %s", error)
                self._lost.add((source, shard))
        return Piece(np.full(stop - start, self._pad_id, np.int64), np.zeros(stop - start, np.uint8))

    def _check_ids(self, ids: np.ndarray, sizes: np.ndarray, spec: PackSpec) -> None:
        # As unsigned numbers negative ids are huge ones: one pass finds both.
        if self._vocab_size is None or not len(ids) or ids.view(np.uint64).max() < self._vocab_size:
            return
        at = int(np.flatnonzero((ids < 0) | (ids >= self._vocab_size))[0])
        piece = int(np.searchsorted(np.cumsum(sizes), at, side="right"))
        shard, document, start, _, _ = spec.pieces[piece]
        place = start + at - int(sizes[:piece].sum())
        raise DataError(
            f"{self._stores[spec.source].name(shard)}: document {document} has the id {ids[at]} at token {place}, "
            f"outside the model's vocabulary of {self._vocab_size}; prepare the data with the model's tokenizer"
        )
