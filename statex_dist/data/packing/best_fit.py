"""Best-fit packing, after "Fewer Truncations Improve Language Modeling" (arXiv:2404.10830).

A document is cut only where it is longer than a pack or, with ``split_tails``, to fill what would be padding.
"""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np

from statex_dist.data.packing.pieces import Pieces, cut

MIN_ROOM = 32
"""Splitting a document to fill a tail shorter than this many tokens would cost more (a cut) than it saves."""


def best_fit(length: np.ndarray, seq_len: int, *, split_tails: bool, chained: bool) -> Pieces:
    """Cut spans longer than ``seq_len``, then put each piece, longest first, into the fullest pack where it fits.

    Args:
        length: ``[spans]`` tokens of each span, in shuffled order.
        seq_len: Tokens of a pack.
        split_tails: Dissolve the emptiest packs and cut their pieces to fill the others' tails.
        chained: The last piece of a cut span begins its pack, so that it can take over the state of the one before.
    """
    span, start, stop = cut(length, seq_len)
    first = start > 0 if chained else np.zeros(len(span), bool)
    pack = _assign(stop - start, seq_len, first)
    pieces = Pieces(span, start, stop, pack, first)
    if not split_tails:
        return pieces
    # What takes over a state, and what hands one on, stays as it is.
    kept = (first | (stop < length[span])) if chained else first
    return _split_tails(pieces, seq_len, kept)


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

    Packs are dissolved while the tails of ``MIN_ROOM`` tokens or more can hold them. Packs with ``kept`` pieces stay.
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
