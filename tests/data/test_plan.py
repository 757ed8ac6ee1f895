import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from statex_dist.data.plan import PACKINGS, Cursor, PackPlan, permutation
from statex_dist.data.store import MemoryStore
from statex_dist.errors import CheckpointError, ConfigError, DataError

from .synthetic import memory_store

lengths_strategy = st.lists(st.integers(1, 60), min_size=1, max_size=40)


def stream(plan: PackPlan, epoch: int):
    for w in range(plan.num_windows(epoch)):
        window = plan.window(epoch, w)
        for p in range(len(window)):
            yield window.pieces(p)


@settings(max_examples=60, deadline=None)
@given(
    lengths_strategy,
    st.integers(1, 20),
    st.sampled_from(PACKINGS),
    st.integers(1, 400),
    st.integers(0, 9),
    st.integers(0, 2),
)
def test_every_token_once_per_epoch(lengths, seq_len, packing, window_tokens, seed, epoch):
    store = memory_store(lengths)
    plan = PackPlan(store, seq_len=seq_len, seed=seed, packing=packing, window_tokens=window_tokens)
    seen = {(s, d): np.zeros(n, int) for s in range(store.num_shards) for d, n in enumerate(store.lengths(s).tolist())}
    for pieces in stream(plan, epoch):
        assert 1 <= sum(stop - start for _, _, start, stop, _ in pieces) <= seq_len
        for shard, document, start, stop, length in pieces:
            assert length == len(seen[shard, document])
            seen[shard, document][start:stop] += 1
    assert all((count == 1).all() for count in seen.values())


@settings(max_examples=40, deadline=None)
@given(lengths_strategy, st.integers(5, 30))
def test_best_fit_cuts_only_what_must_be_cut(lengths, seq_len):
    plan = PackPlan(memory_store(lengths), seq_len=seq_len)
    for pieces in stream(plan, 0):
        for _, _, start, stop, length in pieces:
            assert length > seq_len or (start, stop) == (0, length)
    assert plan.report().cut_documents == sum(n > seq_len for n in lengths)


def test_concat_leaves_no_padding_inside_a_window():
    plan = PackPlan(memory_store([7] * 50), seq_len=16, packing="concat")
    used = sorted(sum(p[3] - p[2] for p in pieces) for pieces in stream(plan, 0))
    assert used == [350 % 16, *[16] * (350 // 16)]


def test_one_document_is_alone():
    plan = PackPlan(memory_store([5, 9, 40]), seq_len=16, packing="one_document")
    assert sorted(len(pieces) for pieces in stream(plan, 0)) == [1] * 5


def test_epochs_and_seeds_differ_but_repeat_exactly():
    store = memory_store([3] * 60)
    runs = {
        (seed, epoch): list(stream(PackPlan(store, seq_len=9, seed=seed), epoch)) for seed in (0, 1) for epoch in (0, 1)
    }
    assert len({str(run) for run in runs.values()}) == 4
    assert list(stream(PackPlan(store, seq_len=9, seed=1), 1)) == runs[1, 1]


def test_permutation_is_pinned():
    # A saved run depends on these numbers: if they change, PLAN_VERSION must.
    assert permutation(8, 0, "shards", 0).tolist() == [4, 1, 3, 0, 6, 5, 2, 7]


def test_waste_of_a_long_tailed_corpus_is_small():
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(6.2, 1.1, 3000), 20000).astype(int) + 2
    report = PackPlan(memory_store(lengths.tolist()), seq_len=4096).report()
    assert report.tokens == lengths.sum()
    assert report.waste < 0.01
    assert report.documents == 3000


def test_take_crosses_windows_and_epochs():
    plan = PackPlan(memory_store([4] * 12), seq_len=8, window_tokens=16)
    assert plan.num_windows(0) == 3
    packs, cursor = plan.take(Cursor(), 7)
    assert cursor == Cursor(1, 0, 1)
    again, same = plan.take(Cursor(0, 2, 0), 3)
    assert same == cursor
    assert [w.pieces(p) for w, p in again] == [w.pieces(p) for w, p in packs[4:]]


def test_state_is_json_and_checked():
    store = memory_store([5, 6, 7])
    plan = PackPlan(store, seq_len=8, seed=3)
    state = json.loads(json.dumps(plan.state(Cursor(2, 0, 1))))
    assert plan.cursor(state) == Cursor(2, 0, 1)
    for change, message in (
        ({"seq_len": 16}, "seq_len was 8, now 16"),
        ({"seed": 4}, "seed was 3, now 4"),
        ({"packing": "concat"}, "packing was 'best_fit', now 'concat'"),
        ({"window_tokens": 5}, "window_tokens was"),
    ):
        with pytest.raises(ConfigError, match=message):
            PackPlan(store, **{"seq_len": 8, "seed": 3} | change).cursor(state)
    with pytest.raises(ConfigError, match="data was"):
        PackPlan(memory_store([5, 6, 8]), seq_len=8, seed=3).cursor(state)
    with pytest.raises(CheckpointError, match="lacks pack"):
        plan.cursor({k: v for k, v in state.items() if k != "pack"})
    with pytest.raises(CheckpointError, match="version 99"):
        plan.cursor(state | {"version": 99})
    with pytest.raises(CheckpointError, match="outside the data"):
        plan.cursor(state | {"window": 7})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 0}, "seq_len is 0; it must be at least 1"),
        ({"seq_len": 4, "window_tokens": 0}, "window_tokens is 0"),
        ({"seq_len": 4, "packing": "best"}, "packing is 'best'; allowed: best_fit, concat, one_document"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ConfigError, match=message):
        PackPlan(memory_store([3]), **options)


def test_empty_data_is_refused():
    with pytest.raises(DataError, match="holds no tokens"):
        PackPlan(MemoryStore([]), seq_len=4).take(Cursor(), 1)
