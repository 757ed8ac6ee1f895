"""Laying spans of documents into packs of a fixed length: pure functions on arrays.

A *span* is a run of tokens of one document that has to be seen; a *piece* is a part of a span that stands in one pack.
Best-fit packing follows "Fewer Truncations Improve Language Modeling" (arXiv:2404.10830): a document is cut only where
it is longer than a pack.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import NamedTuple

import numpy as np

MIN_ROOM = 32
"""Splitting a document to fill a tail shorter than this many tokens would cost more (a cut) than it saves."""


class Pieces(NamedTuple):
    """Parts of spans, and where they stand; each ``[pieces]``.

    Attributes:
        span: Which span.
        start: First token, counted from the beginning of the span.
        stop: One past the last.
        pack: Number of its pack.
        first: Whether it has to be the first of its pack, because it goes on where another pack ends.
    """

    span: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    pack: np.ndarray
    first: np.ndarray


def concatenate(length: np.ndarray, seq_len: int) -> Pieces:
    """Lay spans of ``length`` tokens end to end and cut every ``seq_len``."""
    ends = np.cumsum(length)
    begin = ends - length
    at = np.union1d(begin, np.arange(0, ends[-1], seq_len))
    span = np.searchsorted(begin, at, side="right") - 1
    stop = np.concatenate([at[1:], ends[-1:]]) - begin[span]
    start = at - begin[span]
    return Pieces(span, start, stop, at // seq_len, start > 0)


def one_document(length: np.ndarray, seq_len: int) -> Pieces:
    """Give every span packs of its own."""
    span, start, stop = _cut(length, seq_len)
    return Pieces(span, start, stop, np.arange(len(span)), start > 0)


def best_fit(length: np.ndarray, seq_len: int, *, split_tails: bool, chained: bool) -> Pieces:
    """Cut spans longer than ``seq_len``, then put each piece, longest first, into the fullest pack with room for it.

    Args:
        length: ``[spans]`` tokens of each span, in shuffled order.
        seq_len: Tokens of a pack.
        split_tails: Dissolve the emptiest packs and cut their pieces to fill the others' tails.
        chained: The last piece of a cut span begins its pack, so that it can take over the state of the one before.
    """
    span, start, stop = _cut(length, seq_len)
    first = start > 0 if chained else np.zeros(len(span), bool)
    pack = _assign(stop - start, seq_len, first)
    pieces = Pieces(span, start, stop, pack, first)
    if not split_tails:
        return pieces
    # What takes over a state, and what hands one on, stays as it is.
    kept = (first | (stop < length[span])) if chained else first
    return _split_tails(pieces, seq_len, kept)


def arrange(
    pieces: Pieces, rank: np.ndarray, *, lanes: int | None, offset: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Put packs, and the pieces in them, in their final order.

    Args:
        pieces: What stands in which pack.
        rank: ``[packs]`` the shuffled place of each pack.
        lanes: Packs of a global step, where a pack that goes on where another ends must stand that many places after
            it; ``None`` where states are not carried over.
        offset: Places of the first step that are taken by what came before.

    Returns:
        ``[packs + 1]`` the first piece of each pack, ``[pieces]`` the pieces in that order, and ``[packs]`` whether a
        pack goes on where the one ``lanes`` places before it ends.
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


def _cut(length: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut spans into pieces of at most ``seq_len``: ``(span, start, stop)``, each ``[pieces]``."""
    count = -(-length // seq_len)
    span = np.repeat(np.arange(len(length)), count)
    start = (np.arange(len(span)) - np.repeat(np.cumsum(count) - count, count)) * seq_len
    return span, start, np.minimum(start + seq_len, length[span])


def _assign(size: np.ndarray, seq_len: int, first: np.ndarray) -> np.ndarray:
    """Assign pieces to packs by best fit decreasing: ``[pieces]`` pack numbers.

    Packs with the same room are interchangeable, so the search runs over the distinct rooms only: a sorted list that
    holds at most ``seq_len`` numbers, however many packs are open.

    Args:
        size: ``[pieces]`` tokens of each piece.
        seq_len: Tokens of a pack.
        first: ``[pieces]`` bool; each of these gets a pack that no other of them is in.
    """
    num_packs = int(first.sum())
    pack = np.empty(len(size), np.int64)
    pack[first] = np.arange(num_packs)
    open_packs: dict[int, list[int]] = {}
    for chosen, n in enumerate(size[first].tolist()):
        if n < seq_len:
            open_packs.setdefault(seq_len - n, []).append(chosen)
    rooms = sorted(open_packs)
    order = np.flatnonzero(~first)
    order = order[np.argsort(-size[order], kind="stable")]
    falling, counts = np.unique(-size[order], return_counts=True)
    packs, repeats = [], []
    for n, waiting in zip((-falling).tolist(), counts.tolist(), strict=True):
        while waiting:
            k = bisect_left(rooms, n)
            if k == len(rooms):
                chosen, room = num_packs, seq_len
                num_packs += 1
            else:
                room = rooms[k]
                chosen = open_packs[room].pop()
                if not open_packs[room]:
                    del rooms[k], open_packs[room]
            # The tightest pack stays the tightest while it has room, so equal pieces go into it together.
            taken = min(waiting, room // n)
            waiting -= taken
            room -= taken * n
            if room:
                if room not in open_packs:
                    insort(rooms, room)
                    open_packs[room] = []
                open_packs[room].append(chosen)
            packs.append(chosen)
            repeats.append(taken)
    pack[order] = np.repeat(np.array(packs, np.int64), repeats)
    return pack


def _split_tails(pieces: Pieces, seq_len: int, kept: np.ndarray) -> Pieces:
    """Dissolve the emptiest packs and lay their pieces, cut where needed, into the tails of the others.

    As many packs are dissolved as the tails of ``MIN_ROOM`` tokens or more can hold, but none with a piece of ``kept``.
    """
    num_packs = int(pieces.pack.max()) + 1
    used = np.bincount(pieces.pack, weights=pieces.stop - pieces.start, minlength=num_packs).astype(np.int64)
    fixed = np.bincount(pieces.pack[kept], minlength=num_packs) > 0
    room = np.where(seq_len - used >= MIN_ROOM, seq_len - used, 0)
    order = np.lexsort((used, fixed))  # the emptiest first, the fixed ones last
    order = order[: num_packs - int(fixed.sum())]
    held = np.cumsum(used[order])
    left = room.sum() - np.cumsum(room[order])
    count = int(np.searchsorted(held > left, True)) if len(order) else 0
    if count == 0:
        return pieces
    dissolved = np.zeros(num_packs, bool)
    dissolved[order[:count]] = True
    moving = dissolved[pieces.pack]
    span, start, length = pieces.span[moving], pieces.start[moving], (pieces.stop - pieces.start)[moving]
    # The fullest packs first: what is left over at the end is then the largest tail, in one place.
    targets = np.flatnonzero(~dissolved & (room > 0))
    targets = targets[np.argsort(room[targets], kind="stable")]
    room_ends = np.cumsum(room[targets])
    ends = np.cumsum(length)
    begin = ends - length
    borders = np.concatenate([[0], room_ends[room_ends < ends[-1]]])
    at = np.union1d(begin, borders)
    which = np.searchsorted(begin, at, side="right") - 1
    offset = start[which] - begin[which]
    pack = targets[np.searchsorted(room_ends, at, side="right")]
    stay = ~moving
    joined = Pieces(
        np.concatenate([pieces.span[stay], span[which]]),
        np.concatenate([pieces.start[stay], at + offset]),
        np.concatenate([pieces.stop[stay], np.concatenate([at[1:], ends[-1:]]) + offset]),
        np.concatenate([pieces.pack[stay], pack]),
        np.concatenate([pieces.first[stay], np.zeros(len(at), bool)]),
    )
    return joined._replace(pack=np.unique(joined.pack, return_inverse=True)[1])


def _predecessors(pieces: Pieces, num_packs: int) -> np.ndarray:
    """The pack at whose end each pack goes on, ``[packs]``; -1 where it begins with a document's beginning."""
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
