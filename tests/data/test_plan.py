import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from statex_dist.data.plan import Cursor, PackPlan
from statex_dist.data.window import permutation
from statex_dist.errors import ConfigError, DataError

from .options import make_plan
from .synthetic import MemoryStore, memory_store

WAYS = [
    *((packing, "pad", "restart") for packing in ("best_fit", "concat", "one_document")),
    ("best_fit", "split", "restart"),
    *((packing, "pad", "carry") for packing in ("best_fit", "concat", "one_document")),
    ("best_fit", "split", "carry"),
]
lengths_strategy = st.lists(st.integers(1, 60), min_size=1, max_size=40)


def stream(plan: PackPlan, epoch: int, seq_len: int):
    for w in range(plan.num_windows(epoch)):
        window = plan.window(epoch, w, seq_len)
        for p in range(len(window)):
            yield window.pieces(p)


@settings(max_examples=60, deadline=None)
@given(
    lengths_strategy,
    st.integers(1, 20),
    st.sampled_from(WAYS),
    st.integers(1, 400),
    st.integers(0, 9),
    st.integers(0, 2),
)
def test_every_token_once_per_epoch(lengths, seq_len, packing, window_tokens, seed, epoch):
    store = memory_store(lengths)
    name, tail, long_documents = packing
    plan = make_plan(
        store,
        seed=seed,
        packing=name,
        tail=tail,
        window_tokens=window_tokens,
        long_documents=long_documents,
        lanes=3,
    )
    seen = {(s, d): np.zeros(n, int) for s in range(store.num_shards) for d, n in enumerate(store.lengths(s).tolist())}
    for pieces in stream(plan, epoch, seq_len):
        assert 1 <= sum(stop - start for _, _, start, stop, _ in pieces) <= seq_len
        for shard, document, start, stop, length in pieces:
            assert length == len(seen[shard, document])
            seen[shard, document][start:stop] += 1
    assert all((count == 1).all() for count in seen.values())


@settings(max_examples=40, deadline=None)
@given(lengths_strategy, st.integers(5, 30))
def test_best_fit_cuts_only_what_must_be_cut(lengths, seq_len):
    plan = make_plan(memory_store(lengths))
    for pieces in stream(plan, 0, seq_len):
        for _, _, start, stop, length in pieces:
            assert length > seq_len or (start, stop) == (0, length)
    assert plan.report(seq_len).cut_documents == sum(n > seq_len for n in lengths)


def test_concat_leaves_no_padding_inside_a_window():
    plan = make_plan(memory_store([7] * 50), packing="concat")
    used = sorted(sum(p[3] - p[2] for p in pieces) for pieces in stream(plan, 0, 16))
    assert used == [350 % 16, *[16] * (350 // 16)]


def test_one_document_is_alone():
    plan = make_plan(memory_store([5, 9, 40]), packing="one_document")
    assert sorted(len(pieces) for pieces in stream(plan, 0, 16)) == [1] * 5


def test_epochs_and_seeds_differ_but_repeat_exactly():
    store = memory_store([3] * 60)
    runs = {(seed, epoch): list(stream(make_plan(store, seed=seed), epoch, 9)) for seed in (0, 1) for epoch in (0, 1)}
    assert len({str(run) for run in runs.values()}) == 4
    assert list(stream(make_plan(store, seed=1), 1, 9)) == runs[1, 1]


def test_permutation_is_pinned():
    # A saved run depends on these numbers: if they change, PLAN_VERSION must.
    assert permutation(8, 0, "shards", 0).tolist() == [4, 1, 3, 0, 6, 5, 2, 7]


def test_waste_of_a_long_tailed_corpus_is_small():
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(6.2, 1.1, 3000), 20000).astype(int) + 2
    report = make_plan(memory_store(lengths.tolist())).report(4096)
    assert report.tokens == lengths.sum()
    assert report.waste < 0.01
    assert report.documents == 3000


def test_take_crosses_windows_and_epochs():
    plan = make_plan(memory_store([4] * 12), window_tokens=16)
    assert plan.num_windows(0) == 3
    packs, cursor = plan.take(Cursor(), 7, 8)
    assert cursor == Cursor(1, 0, ((8, 1),))
    again, same = plan.take(Cursor(0, 2), 3, 8)
    assert same == cursor
    assert [w.pieces(p) for w, p in again] == [w.pieces(p) for w, p in packs[4:]]


@settings(max_examples=60, deadline=None)
@given(
    lengths_strategy,
    st.sampled_from(WAYS),
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 3)), min_size=1, max_size=8),
    st.integers(20, 300),
)
def test_a_change_of_length_loses_and_repeats_nothing(lengths, way, changes, window_tokens):
    """Steps of 2 packs at lengths that change in the middle of windows: an epoch is still each token once."""
    packing, tail, long_documents = way
    store = memory_store(lengths)
    plan = make_plan(
        store, packing=packing, tail=tail, long_documents=long_documents, lanes=2, window_tokens=window_tokens
    )
    seen = {(s, d): np.zeros(n, int) for s in range(store.num_shards) for d, n in enumerate(store.lengths(s).tolist())}
    cursor, packs = Cursor(), []
    schedule = [seq_len for seq_len, steps in changes for _ in range(steps)]
    while cursor.epoch == 0:
        seq_len = schedule.pop(0) if schedule else 7
        taken, cursor = plan.take(cursor, 2, seq_len)
        assert all(window.seq_len == seq_len for window, _ in taken)
        packs += taken
    assume((cursor.epoch, cursor.window) == (1, 0))
    later = sum(count for _, count in cursor.taken)  # the last step may reach into the next epoch
    for window, pack in packs[: len(packs) - later]:
        for shard, document, start, stop, _ in window.pieces(pack):
            seen[shard, document][start:stop] += 1
    assert all((count == 1).all() for count in seen.values())


@settings(max_examples=60, deadline=None)
@given(
    st.one_of(lengths_strategy, st.lists(st.sampled_from([65, 66, 67, 70, 133, 143]), min_size=8, max_size=20)),
    st.sampled_from([5, 17, 30, 64]),
    st.sampled_from([("best_fit", "pad"), ("best_fit", "split"), ("concat", "pad")]),
    st.integers(1, 5),
    st.integers(0, 1000),
)
def test_carried_packs_go_on_in_their_lane(lengths, seq_len, packing, width, seed):
    plan = make_plan(
        memory_store(lengths),
        seed=seed,
        packing=packing[0],
        tail=packing[1],
        long_documents="carry",
        lanes=width,
        window_tokens=sum(lengths) // 2 + 1,
    )
    cursor, stream = Cursor(), []
    while cursor.epoch == 0:
        taken, cursor = plan.take(cursor, width, seq_len)
        stream += taken
    carried = begun = 0
    for i, (window, pack) in enumerate(stream):
        shard, document, start, _, _ = window.pieces(pack)[0]
        begun += start > 0
        if window.carried[pack]:
            carried += 1
            before, place = stream[i - width]  # one step earlier, in the same lane
            assert before is window
            assert before.pieces(place)[-1][:2] == (shard, document)
            assert before.pieces(place)[-1][3] == start > 0
            assert before.tokens(place) == seq_len
    # A chain is broken only where a lane ends: once for each lane and window (or where a tail is filled).
    if packing[1] == "pad":
        assert begun - carried <= width * len({id(window) for window, _ in stream})


def test_split_tails_never_tear_a_chain():
    """Documents a little longer than a pack: dissolving a full pack made a ring of packs, and planning had no end."""
    lengths = [143, 133, 67, 66, 70, 137, 79, 143, 136, 138, 65, 69]
    plan = make_plan(memory_store(lengths), seed=601, tail="split", long_documents="carry", lanes=2)
    packs, _ = plan.take(Cursor(), 2, 64)
    assert len(packs) == 2


def test_split_tails_leave_next_to_no_padding():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(9.5, 1.0, 3000), 16_000, 200_000).astype(int) + 2
    padded = make_plan(memory_store(lengths.tolist())).report(65536)
    split = make_plan(memory_store(lengths.tolist()), tail="split").report(65536)
    concat = make_plan(memory_store(lengths.tolist()), packing="concat").report(65536)
    assert padded.tokens == split.tokens == lengths.sum()
    assert padded.waste > 0.005
    assert split.waste < 0.001
    assert padded.cut_documents < split.cut_documents < 0.6 * concat.cut_documents


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window_tokens": 0}, "window_tokens is 0"),
        ({"packing": "best"}, "packing.*'best'.*best_fit, concat, one_document"),
        ({"tail": "cut"}, "tail.*'cut'.*pad, split"),
        ({"packing": "concat", "tail": "split"}, "tail 'split'.*'best_fit', not 'concat'"),
        ({"long_documents": "go on"}, "long_documents.*'go on'.*restart, carry"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ConfigError, match=message):
        make_plan(memory_store([3]), **options)


def test_empty_data_is_refused():
    with pytest.raises(DataError, match="holds no tokens"):
        make_plan(MemoryStore([])).take(Cursor(), 1, 4)
