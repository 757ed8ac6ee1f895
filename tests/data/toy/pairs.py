"""Two short documents in a pack, one piece of a long one in a pack."""

import numpy as np

from statex_dist.data.packing.pieces import Pieces, cut
from statex_dist.data.packing.registry import PackingStrategy


def pairs(length: np.ndarray, seq_len: int, *, split_tails: bool, chained: bool) -> Pieces:
    span, start, stop = cut(length, seq_len)
    short = stop - start <= seq_len // 2
    pack = np.empty(len(span), np.int64)
    pack[short] = np.arange(short.sum()) // 2
    pack[~short] = -(-short.sum() // 2) + np.arange((~short).sum())
    return Pieces(span, start, stop, pack, start > 0 if chained else np.zeros(len(span), bool))


PAIRS = PackingStrategy(name="pairs", lay_out=pairs)
