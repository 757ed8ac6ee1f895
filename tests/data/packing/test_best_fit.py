import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from statex_dist.data.packing.best_fit import MIN_ROOM, best_fit
from statex_dist.data.packing.pieces import concatenate, one_document
from statex_dist.data.window import arrange, lane_places

lengths_strategy = st.lists(st.integers(1, 90), min_size=1, max_size=60).map(np.array)


def best_fit_decreasing(length: np.ndarray, seq_len: int) -> list[list[int]]:
    """The algorithm as the paper states it: each item, longest first, into the fullest bin that takes it."""
    bins: list[list[int]] = []
    items = [n for whole in length for n in [seq_len] * (whole // seq_len) + [whole % seq_len] if n]
    for n in sorted(items, reverse=True):
        rooms = [seq_len - sum(held) for held in bins]
        fitting = [i for i, room in enumerate(rooms) if room >= n]
        if fitting:
            bins[min(fitting, key=lambda i: rooms[i])].append(n)
        else:
            bins.append([n])
    return bins


@settings(max_examples=200, deadline=None)
@given(lengths_strategy, st.integers(1, 60))
def test_best_fit_is_best_fit_decreasing(length, seq_len):
    pieces = best_fit(length, seq_len, split_tails=False, chained=False)
    # Packs that are equally full are interchangeable, so what they hold may differ; how full all are may not.
    fills = np.bincount(pieces.pack, weights=pieces.stop - pieces.start)
    assert sorted(fills) == sorted(sum(held) for held in best_fit_decreasing(length, seq_len))


@settings(max_examples=200, deadline=None)
@given(lengths_strategy.map(lambda lengths: lengths * 7), st.integers(40, 400), st.booleans())
def test_split_tails_fill_what_they_can(length, seq_len, chained):
    whole = best_fit(length, seq_len, split_tails=False, chained=chained)
    split = best_fit(length, seq_len, split_tails=True, chained=chained)
    used = np.bincount(split.pack, weights=split.stop - split.start)
    assert used.max() <= seq_len
    assert len(used) <= whole.pack.max() + 1
    assert sorted(np.unique(split.pack)) == list(range(len(used)))
    # Each token of each span once.
    order = np.lexsort((split.start, split.span))
    span, start, stop = split.span[order], split.start[order], split.stop[order]
    for i, n in enumerate(length):
        mine = span == i
        assert start[mine][0] == 0
        assert (start[mine][1:] == stop[mine][:-1]).all()
        assert stop[mine][-1] == n
    if not chained:
        # Nothing more could be dissolved: the emptiest pack does not fit into the tails of the others.
        room = np.where(seq_len - used >= MIN_ROOM, seq_len - used, 0)
        emptiest = used.argmin()
        assert room.sum() - room[emptiest] < used[emptiest] + MIN_ROOM * len(used)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 60), st.integers(1, 8), st.integers(0, 7))
def test_lanes_hold_runs_of_neighbours(num_packs, width, offset):
    places = lane_places(num_packs, width, offset % width)
    assert sorted(places) == list(range(num_packs))
    steps = np.diff(places)
    assert (steps != width).sum() <= min(width, num_packs) - 1  # a run is broken only where a lane ends


@pytest.mark.parametrize("lay_out", [concatenate, one_document])
def test_a_chain_keeps_its_order(lay_out):
    pieces = lay_out(np.array([10, 45, 3, 32]), 8)
    bounds, order, carried = arrange(pieces, np.arange(int(pieces.pack.max()) + 1)[::-1], lanes=1, offset=0)
    starts, spans = pieces.start[order], pieces.span[order]
    for pack in range(1, len(bounds) - 1):
        first = bounds[pack]
        if carried[pack]:
            assert spans[first] == spans[first - 1]
            assert starts[first] == pieces.stop[order][first - 1] > 0
    assert carried.sum() == (pieces.start > 0).sum()  # in one lane nothing is broken
