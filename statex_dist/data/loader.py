"""Packed batches for one rank, in an order that does not depend on the number of ranks.

Global step ``i`` consists of ``global_packs`` consecutive packs of the plan's stream; rank ``r`` of ``W`` builds the
``r``-th run of ``global_packs / W`` of them. The state that travels with each batch is the place in the stream after
its *global* step, so it is the same on every rank and valid for any number of ranks.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
import torch

from statex_dist.data.plan import Cursor, PackPlan, PackReport, WindowPlan
from statex_dist.data.prefetch import prefetch
from statex_dist.data.store import ShardStore
from statex_dist.data.types import IGNORE_INDEX, PackedBatch
from statex_dist.errors import ConfigError


class PackedLoader:
    """Iterates the packs of a store; each item is the list of this rank's batches of one global step.

    Iterating goes on from the current state: a fresh iterator continues where the last one stopped. All ranks get the
    same number of items. A global step that is incomplete at the end of an epoch is filled from the next epoch, also
    at the end of the last one, so every document is seen in every epoch.

    Args:
        store: The documents.
        seq_len: Tokens of a pack.
        global_packs: Packs of one optimizer step over all ranks; a multiple of ``world_size``.
        pad_id: Id in the positions after a pack's last document.
        rank: This rank.
        world_size: Number of ranks that share the steps (data-parallel ranks).
        seed: Seed of the shuffles.
        packing: See :class:`~statex_dist.data.plan.PackPlan`.
        window_tokens: See :class:`~statex_dist.data.plan.PackPlan`.
        epochs: Passes over the data; ``None`` for no end.
        prefetch_steps: Global steps built ahead in a thread; 0 builds in the caller.

    Raises:
        ConfigError: A value is out of its range, or ``global_packs`` is not a multiple of ``world_size``.
    """

    def __init__(
        self,
        store: ShardStore,
        *,
        seq_len: int,
        global_packs: int,
        pad_id: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        packing: str = "best_fit",
        window_tokens: int = 1 << 26,
        epochs: int | None = None,
        prefetch_steps: int = 1,
    ):
        if world_size < 1 or not 0 <= rank < world_size:
            raise ConfigError(f"rank {rank} of world size {world_size}; rank must be in 0..world_size - 1")
        if global_packs < 1 or global_packs % world_size:
            raise ConfigError(
                f"global_packs is {global_packs} for {world_size} ranks; it must be a positive multiple of the number "
                f"of ranks, for example {max(1, round(global_packs / world_size)) * world_size}"
            )
        if epochs is not None and epochs < 1:
            raise ConfigError(f"epochs is {epochs}; it must be at least 1, or null for no end")
        if prefetch_steps < 0:
            raise ConfigError(f"prefetch_steps is {prefetch_steps}; it must be at least 0")
        self.plan = PackPlan(store, seq_len=seq_len, seed=seed, packing=packing, window_tokens=window_tokens)
        self.store = store
        self.pad_id = pad_id
        self.epochs = epochs
        self._global_packs = global_packs
        self._mine = slice(rank * (global_packs // world_size), (rank + 1) * (global_packs // world_size))
        self._prefetch_steps = prefetch_steps
        self._cursor = Cursor()
        self._loads = 0

    def __iter__(self) -> Generator[list[PackedBatch], None, None]:
        while True:
            loads = self._loads
            steps = prefetch(self._steps(self._cursor), self._prefetch_steps)
            try:
                for cursor, batches in steps:
                    self._cursor = cursor
                    yield batches
                    if self._loads != loads:
                        break  # a state was loaded under a running iterator: what is prefetched is of the old place
                else:
                    return
            finally:
                steps.close()  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, Any]:
        """Return the state after the last step that was yielded (JSON-able)."""
        return self.plan.state(self._cursor)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``, which any rank of any world size may have saved; running iterators follow.

        Raises:
            CheckpointError: It is not a loader state.
            ConfigError: It belongs to other data, another seed, sequence length or packing.
        """
        self._cursor = self.plan.cursor(state)
        self._loads += 1

    def report(self, max_windows: int | None = None) -> PackReport:
        """Return what packing costs in the first epoch (or its first ``max_windows`` windows)."""
        # A plan of its own: the prefetch thread may be using the loader's.
        plan = PackPlan(
            self.store,
            seq_len=self.plan.seq_len,
            seed=self.plan.seed,
            packing=self.plan.packing,
            window_tokens=self.plan.window_tokens,
        )
        return plan.report(max_windows=max_windows)

    def _steps(self, cursor: Cursor) -> Iterator[tuple[Cursor, list[PackedBatch]]]:
        while self.epochs is None or cursor.epoch < self.epochs:
            packs, cursor = self.plan.take(cursor, self._global_packs)
            state = self.plan.state(cursor)
            mine = packs[self._mine]
            yield cursor, [self._build(plan, pack, dict(state)) for plan, pack in mine]

    def _build(self, plan: WindowPlan, pack: int, state: dict[str, Any]) -> PackedBatch:
        return build_pack(self.store, plan.pieces(pack), self.plan.seq_len, self.pad_id, state)


def build_pack(
    store: ShardStore, pieces: list[tuple[int, int, int, int, int]], seq_len: int, pad_id: int, state: dict[str, Any]
) -> PackedBatch:
    """Read the pieces of a pack and lay them out as a :class:`PackedBatch` of ``seq_len`` tokens.

    A document of ``n`` tokens gives ``n - 1`` targets: its EOS has none. Where a document goes on behind a piece, the
    piece's last token keeps its true target, read from the document. A target whose ``loss_mask`` is 0 is ignored.

    Args:
        store: The documents.
        pieces: ``(shard, document, start, stop, document length)`` of each piece, in order.
        seq_len: Tokens of the pack.
        pad_id: Id of the positions behind the last piece.
        state: The loader's state after this pack's global step.
    """
    read = [store.read(shard, document, start, stop) for shard, document, start, stop, _ in pieces]
    sizes = np.array([stop - start for _, _, start, stop, _ in pieces], np.int64)
    used = int(sizes.sum())
    ids = np.empty(seq_len, np.int64)
    np.concatenate([piece.tokens for piece in read], out=ids[:used], casting="same_kind")
    ids[used:] = pad_id

    labels = np.full(seq_len, IGNORE_INDEX, np.int64)
    labels[: used - 1] = ids[1:used]
    if store.has_loss_mask:
        masks = [np.ones(len(p.tokens), np.uint8) if p.loss_mask is None else p.loss_mask for p in read]
        labels[: used - 1][np.concatenate(masks)[1:] == 0] = IGNORE_INDEX
    ends = np.cumsum(sizes)
    labels[ends - 1] = IGNORE_INDEX
    for end, (shard, document, _, stop, length) in zip(ends.tolist(), pieces, strict=True):
        if stop < length:
            following = store.read(shard, document, stop, stop + 1)
            if following.loss_mask is None or following.loss_mask[0]:
                labels[end - 1] = following.tokens[0]

    if used < seq_len:
        sizes = np.append(sizes, seq_len - used)
    borders = np.concatenate([[0], np.cumsum(sizes)])
    positions = np.arange(seq_len) - np.repeat(borders[:-1], sizes)
    segments = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    return PackedBatch(
        input_ids=torch.from_numpy(ids)[None],
        labels=torch.from_numpy(labels)[None],
        position_ids=torch.from_numpy(positions)[None],
        cu_seqlens=torch.from_numpy(borders.astype(np.int32)),
        seq_idx=torch.from_numpy(segments)[None],
        loader_state=state,
    )
