"""Combined CRCs against zlib's own over the whole."""

import itertools
import random
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from statex_dist.checkpoint.formats.crc import CrcLedger, combine, crc_of_zeros


@given(st.binary(max_size=200), st.binary(max_size=200))
def test_combine(first, second):
    assert combine(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(first + second)


@pytest.mark.parametrize("size", [0, 1, 4095, 1 << 20, (3 << 20) + 7])
def test_zeros(size):
    assert crc_of_zeros(size) == zlib.crc32(bytes(size))
    assert combine(7, crc_of_zeros(size), size) == zlib.crc32(bytes(size), 7)


@given(st.binary(min_size=1, max_size=300), st.lists(st.integers(1, 299), max_size=12), st.randoms())
def test_pieces_in_any_order(data, cuts, rng):
    borders = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    pieces = list(itertools.pairwise(borders))
    rng.shuffle(pieces)
    ledger = CrcLedger()
    left = list(pieces)
    for start, stop in pieces:
        assert sum(b - a for a, b in ledger.gaps(len(data))) == sum(b - a for a, b in left)
        ledger.note(start, data[start:stop])
        ledger.note(start, data[start:stop])  # read twice: counted once
        left.remove((start, stop))
    assert ledger.gaps(len(data)) == []
    assert ledger.total() == zlib.crc32(data)


def test_what_overlaps_is_left_to_the_gaps():
    data = random.Random(0).randbytes(100)
    ledger = CrcLedger()
    ledger.note(10, data[10:50])
    for start, stop in ((0, 20), (40, 60), (10, 50), (20, 30), (0, 100)):
        ledger.note(start, data[start:stop])
    assert ledger.gaps(100) == [(0, 10), (50, 100)]
    for start, stop in ledger.gaps(100):
        ledger.note(start, data[start:stop])
    assert ledger.total() == zlib.crc32(data)
