"""Pieces of documents in packs, and the two strategies that need no search.

A *span* is a run of tokens of one document that has to be seen; a *piece* is a part of a span that stands in one pack.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Pieces(NamedTuple):
    """Parts of spans, and where they stand; each ``[pieces]``.

    Attributes:
        span: Which span.
        start: First token, counted from the beginning of the span.
        stop: One past the last.
        pack: Number of its pack.
        first: Whether it has to be the first of its pack, because it continues another pack.
    """

    span: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    pack: np.ndarray
    first: np.ndarray


def cut(length: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut spans into pieces of at most ``seq_len``: ``(span, start, stop)``, each ``[pieces]``."""
    count = -(-length // seq_len)
    span = np.repeat(np.arange(len(length)), count)
    start = (np.arange(len(span)) - np.repeat(np.cumsum(count) - count, count)) * seq_len
    return span, start, np.minimum(start + seq_len, length[span])


def concatenate(length: np.ndarray, seq_len: int, *, split_tails: bool = False, chained: bool = False) -> Pieces:
    """Lay spans of ``length`` tokens end to end and cut every ``seq_len``."""
    ends = np.cumsum(length)
    begin = ends - length
    at = np.union1d(begin, np.arange(0, ends[-1], seq_len))
    span = np.searchsorted(begin, at, side="right") - 1
    stop = np.concatenate([at[1:], ends[-1:]]) - begin[span]
    start = at - begin[span]
    return Pieces(span, start, stop, at // seq_len, start > 0)


def one_document(length: np.ndarray, seq_len: int, *, split_tails: bool = False, chained: bool = False) -> Pieces:
    """Give every span packs of its own."""
    span, start, stop = cut(length, seq_len)
    return Pieces(span, start, stop, np.arange(len(span)), start > 0)
