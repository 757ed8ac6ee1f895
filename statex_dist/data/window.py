"""The packs of one window: their pieces, their order, and their cost.

Permutations sort the raw output of Philox, keyed by a hash of their purpose; unlike ``Generator.permutation``, numpy
promises that stream never to change.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from statex_dist.data.packing.pieces import Pieces


def permutation(n: int, seed: int, *purpose: str | int) -> np.ndarray:
    """Return a permutation of ``n`` numbers, ``[n]`` int64, that depends on nothing but the arguments."""
    key = blake2b(repr((seed, *purpose)).encode(), digest_size=16).digest()
    raw = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(n)
    return np.argsort(raw, kind="stable")


@dataclass(frozen=True, slots=True)
class WindowPlan:
    """The packs of one window; pack ``p`` consists of the rows ``bounds[p]..bounds[p + 1]`` of ``table``.

    Attributes:
        seq_len: Tokens of a pack, padding included.
        bounds: ``[packs + 1]``, the first piece of each pack.
        table: ``[pieces, 5]`` int64: shard, document, first token, one past the last, and the document's length.
        carried: ``[packs]`` bool, whether the pack continues the one before it in its lane.
    """

    seq_len: int
    bounds: np.ndarray
    table: np.ndarray
    carried: np.ndarray

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def pieces(self, pack: int) -> list[tuple[int, int, int, int, int]]:
        """Return ``(shard, document, start, stop, document length)`` of each piece of ``pack``, in order."""
        return list(map(tuple, self.table[self.bounds[pack] : self.bounds[pack + 1]].tolist()))

    def tokens(self, pack: int) -> int:
        """Return the tokens of ``pack``, padding not counted."""
        return self._tokens(self.bounds[pack], self.bounds[pack + 1])

    def tokens_before(self, pack: int) -> int:
        """Return the tokens of all packs before ``pack``."""
        return self._tokens(0, self.bounds[pack])

    def _tokens(self, begin: int, end: int) -> int:
        return int((self.table[begin:end, 3] - self.table[begin:end, 2]).sum())

    def left_over(self, pack: int) -> np.ndarray:
        """Return what the packs from ``pack`` on hold, as ``[n, 5]`` like the table; neighbouring pieces are joined."""
        pieces = self.table[self.bounds[min(pack, len(self))] :]
        pieces = pieces[np.lexsort((pieces[:, 2], pieces[:, 1], pieces[:, 0]))]
        begins = np.ones(len(pieces), bool)
        begins[1:] = (pieces[1:, :2] != pieces[:-1, :2]).any(1) | (pieces[1:, 2] != pieces[:-1, 3])
        spans = pieces[begins]
        if len(spans):
            spans[:, 3] = pieces[np.append(np.flatnonzero(begins)[1:], len(pieces)) - 1, 3]
        return spans


@dataclass(frozen=True, kw_only=True, slots=True)
class PackReport:
    """What packing costs.

    Attributes:
        seq_len: Tokens of a pack, padding included.
        windows: Windows counted.
        packs: Packs in them.
        pieces: Segments in them, padding not counted.
        documents: Documents in them.
        cut_documents: Documents cut into several pieces.
        tokens: Tokens in them, padding not counted.
    """

    seq_len: int
    windows: int
    packs: int
    pieces: int
    documents: int
    cut_documents: int
    tokens: int

    @classmethod
    def of(cls, windows: Iterable[WindowPlan], seq_len: int) -> PackReport:
        """Count over ``windows``, whose packs have ``seq_len`` tokens."""
        counts = np.zeros((0, 5), np.int64)
        for window in windows:  # one at a time: the plan keeps few
            start, stop, length = window.table[:, 2:].T
            cut = (start == 0) & (stop < length)
            row = [len(window), len(start), (start == 0).sum(), cut.sum(), (stop - start).sum()]
            counts = np.vstack([counts, row])
        packs, pieces, documents, cut_documents, tokens = counts.sum(0).tolist()
        return cls(
            seq_len=seq_len,
            windows=len(counts),
            packs=packs,
            pieces=pieces,
            documents=documents,
            cut_documents=cut_documents,
            tokens=tokens,
        )

    @property
    def waste(self) -> float:
        """Fraction of all positions that is padding."""
        return 1.0 - self.tokens / (self.packs * self.seq_len)

    @property
    def documents_per_pack(self) -> float:
        """Mean number of whole or cut documents in a pack."""
        return self.pieces / self.packs


def arrange(
    pieces: Pieces, rank: np.ndarray, *, lanes: int | None, offset: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Put packs, and the pieces in them, in their final order.

    Args:
        pieces: What stands in which pack.
        rank: ``[packs]`` the shuffled place of each pack.
        lanes: Packs of a global step, where a pack that continues another must stand that many places after
            it; ``None`` where states are not carried over.
        offset: Places of the first step that are taken by what came before.

    Returns:
        ``[packs + 1]`` the first piece of each pack, ``[pieces]`` the pieces in that order, and ``[packs]`` whether a
        pack continues the one ``lanes`` places before it.
    """
    num_packs = len(rank)
    carried = np.zeros(num_packs, bool)
    if lanes is None:
        place = rank
        # Stable: inside a pack the pieces keep the order of the document shuffle, not the packer's order by length.
        order = np.argsort(place[pieces.pack], kind="stable")
    else:
        before = _predecessors(pieces, num_packs)
        root, depth = _chains(before)
        place = np.empty(num_packs, np.int64)
        place[np.lexsort((depth, rank[root]))] = lane_places(num_packs, lanes, offset)
        order = np.lexsort((~pieces.first, place[pieces.pack]))
        follows = np.flatnonzero(before >= 0)
        carried[place[follows]] = place[before[follows]] == place[follows] - lanes
    counts = np.bincount(pieces.pack, minlength=num_packs)[np.argsort(place)]
    return np.concatenate([[0], np.cumsum(counts)]), order, carried


def lane_places(num_packs: int, width: int, offset: int) -> np.ndarray:
    """Return the place in the stream of each of ``num_packs`` packs, so that consecutive packs share a lane.

    The stream is read in rows of ``width`` (the packs of a global step). Lane by lane is filled with a run of
    consecutive packs, so what follows a pack stands one row below it.

    Args:
        num_packs: Packs, in an order in which those that continue one another are neighbours.
        width: Packs of a row.
        offset: Places of the first row that are taken by what came before.

    Returns:
        ``[num_packs]`` int64, a permutation.
    """
    first = (np.arange(width) - offset) % width
    capacity = np.maximum(-(-(num_packs - first) // width), 0)
    begin = np.cumsum(capacity) - capacity
    lane = np.repeat(np.arange(width), capacity)
    return first[lane] + (np.arange(num_packs) - begin[lane]) * width


def _predecessors(pieces: Pieces, num_packs: int) -> np.ndarray:
    """The pack that each pack continues, ``[packs]``; -1 where it begins with a document's beginning."""
    # In packs: those that must be first, then the order of the documents; as the final order has it.
    inside = np.lexsort((np.arange(len(pieces.pack)), ~pieces.first, pieces.pack))
    is_last = np.zeros(len(inside), bool)
    is_last[inside] = np.append(pieces.pack[inside][1:] != pieces.pack[inside][:-1], True)
    order = np.lexsort((pieces.start, pieces.span))
    left, right = order[:-1], order[1:]
    linked = (
        (pieces.span[left] == pieces.span[right])
        & (pieces.stop[left] == pieces.start[right])
        & pieces.first[right]
        & is_last[left]
    )
    before = np.full(num_packs, -1)
    before[pieces.pack[right[linked]]] = pieces.pack[left[linked]]
    return before


def _chains(before: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first pack of each pack's chain and its place in the chain, both ``[packs]``, by pointer doubling."""
    root = np.where(before >= 0, before, np.arange(len(before)))
    depth = (before >= 0).astype(np.int64)
    for _ in range(len(before).bit_length()):
        depth += depth[root]
        root = root[root]
    return root, depth
