import itertools
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from statex_dist.data.loader import PackedLoader
from statex_dist.data.store import MemoryStore
from statex_dist.data.types import IGNORE_INDEX, PackedBatch
from statex_dist.errors import ConfigError, DataError

from .synthetic import EOS, PAD, all_documents, memory_store

FIELDS = ("input_ids", "labels", "position_ids", "cu_seqlens", "seq_idx")


def make(store, **options) -> PackedLoader:
    settings = {"seq_len": 16, "global_packs": 4, "pad_id": PAD, "window_tokens": 100, "prefetch_steps": 0}
    return PackedLoader(store, **settings | options)


def as_lists(batch: PackedBatch):
    return [getattr(batch, name).tolist() for name in FIELDS]


def global_stream(store, world_size: int, steps: int, state=None, **options):
    """Packs of ``steps`` global steps in global order, and the state after each step."""
    loaders = [make(store, rank=r, world_size=world_size, **options) for r in range(world_size)]
    for loader in loaders:
        if state is not None:
            loader.load_state_dict(state)
    packs, states = [], []
    for per_rank in itertools.islice(zip(*loaders, strict=True), steps):
        packs.append([as_lists(batch) for batches in per_rank for batch in batches])
        found = [batch.loader_state for batches in per_rank for batch in batches]
        assert all(s == found[0] == loaders[0].state_dict() for s in found)
        states.append(found[0])
    return packs, states


LENGTHS = [3, 40, 7, 16, 2, 9, 30, 5, 12, 17, 33, 4, 8, 21, 6, 11, 2, 14, 19, 10]


@pytest.mark.parametrize("packing", ["best_fit", "concat", "one_document"])
def test_same_packs_in_the_same_order_at_any_world_size(packing):
    store = memory_store(LENGTHS)
    one, states = global_stream(store, 1, 20, packing=packing)
    for world_size in (2, 4):
        assert global_stream(store, world_size, 20, packing=packing) == (one, states)
    assert states[-1]["epoch"] >= 2


def test_resume_at_every_point_twice_and_on_another_world_size():
    store = memory_store(LENGTHS)
    whole, states = global_stream(store, 2, 16, global_packs=4)
    assert states[-4]["epoch"] >= 1  # the cut points below lie in several windows and epochs
    assert {state["window"] for state in states} >= {0, 1, 2}
    for step, state in enumerate(states[:-3]):
        for world_size in (1, 2, 4):
            tail, tail_states = global_stream(store, world_size, 1, state)
            assert tail == whole[step + 1 : step + 2]
            again, _ = global_stream(store, world_size, 2, tail_states[-1])
            assert again == whole[step + 2 : step + 4]


def test_resume_exactly_at_window_and_epoch_borders():
    store = memory_store([16] * 12, shards=3)  # 12 packs, 4 to a window of 64 tokens
    whole, states = global_stream(store, 1, 9, window_tokens=64)
    assert [(s["epoch"], s["window"], s["pack"]) for s in states[:3]] == [(0, 1, 0), (0, 2, 0), (1, 0, 0)]
    for step, state in enumerate(states[:-1]):
        assert global_stream(store, 4, 8 - step, state, window_tokens=64)[0] == whole[step + 1 :]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=25),
    st.integers(1, 24),
    st.sampled_from(["best_fit", "concat", "one_document"]),
    st.booleans(),
)
def test_pack_layout_and_labels(lengths, seq_len, packing, masks):
    store = memory_store(lengths, masks=masks)
    loader = make(store, seq_len=seq_len, global_packs=1, packing=packing, epochs=1)
    targets = 0
    for pieces, (batch,) in zip(every_pack(loader), loader, strict=True):
        assert (
            batch.input_ids.shape
            == batch.labels.shape
            == batch.position_ids.shape
            == batch.seq_idx.shape
            == (1, seq_len)
        )
        assert batch.input_ids.dtype == batch.labels.dtype == batch.position_ids.dtype == torch.int64
        assert batch.cu_seqlens.dtype == batch.seq_idx.dtype == torch.int32
        borders = batch.cu_seqlens.tolist()
        assert borders[0] == 0
        assert borders[-1] == seq_len
        used = sum(stop - start for _, _, start, stop, _ in pieces)
        assert len(borders) - 1 == len(pieces) + (used < seq_len)
        for segment, (begin, end) in enumerate(itertools.pairwise(borders)):
            assert (batch.seq_idx[0, begin:end] == segment).all()
            assert batch.position_ids[0, begin:end].tolist() == list(range(end - begin))
        for (shard, document, start, stop, length), begin in zip(pieces, borders, strict=False):
            whole = store.read(shard, document, 0, length)
            assert batch.input_ids[0, begin : begin + stop - start].tolist() == whole.tokens[start:stop].tolist()
            for t in range(start, stop):
                learned = t + 1 < length and (whole.loss_mask is None or whole.loss_mask[t + 1] == 1)
                expected = int(whole.tokens[t + 1]) if learned else IGNORE_INDEX
                assert batch.labels[0, begin + t - start] == expected
                targets += learned
        assert (batch.labels[0, used:] == IGNORE_INDEX).all()
        assert (batch.input_ids[0, used:] == PAD).all()
    if not masks:
        assert targets == sum(n - 1 for n in lengths)  # each document's n - 1 targets, cut or not


def every_pack(loader: PackedLoader):
    plan = loader.plan
    return [plan.window(0, w).pieces(p) for w in range(plan.num_windows(0)) for p in range(len(plan.window(0, w)))]


def test_target_of_eos_is_never_the_next_document():
    store = memory_store([5, 6, 7, 8])
    (batch,) = next(iter(make(store, seq_len=32, global_packs=1)))
    assert (batch.labels[0][batch.input_ids[0] == EOS] == IGNORE_INDEX).all()
    assert (batch.labels == EOS).sum() == 4  # but EOS itself is a target


def test_last_step_of_the_last_epoch_is_filled_and_loses_nothing():
    store = memory_store([16] * 6, shards=1)
    loader = make(store, epochs=1)
    steps = list(loader)
    assert [len(step) for step in steps] == [4, 4]
    seen = {tuple(batch.input_ids[0].tolist()) for step in steps for batch in step}
    assert seen == {tuple(d.tolist()) for d in all_documents(store)}
    assert loader.state_dict()["epoch"] == 1
    assert list(loader) == []  # resumed at its end, a run has nothing left


@pytest.mark.parametrize("prefetch_steps", [1, 3])
def test_prefetch_changes_nothing(prefetch_steps):
    store = memory_store(LENGTHS)
    assert global_stream(store, 2, 12, prefetch_steps=prefetch_steps) == global_stream(store, 2, 12)


def test_state_is_that_of_the_step_in_hand_not_of_the_prefetched_one():
    store = memory_store(LENGTHS)
    loader = make(store, prefetch_steps=3)
    steps = iter(loader)
    for _ in range(3):
        batches = next(steps)
        assert loader.state_dict() == batches[0].loader_state
    steps.close()
    rest = next(iter(loader))  # a new iterator goes on behind the step in hand
    assert [as_lists(b) for b in rest] == global_stream(store, 1, 4)[0][3]


def test_loading_a_state_moves_a_running_iterator():
    store = memory_store(LENGTHS)
    whole, states = global_stream(store, 1, 6)
    loader = make(store, prefetch_steps=2)
    steps = iter(loader)
    next(steps)
    loader.load_state_dict(states[3])
    assert [as_lists(b) for b in next(steps)] == whole[4]
    loader.load_state_dict(states[0])
    assert [as_lists(b) for b in next(steps)] == whole[1]
    steps.close()


class BrokenStore(MemoryStore):
    def read(self, shard, i, start, stop):
        raise DataError("shard 7 is gone")


def test_error_in_the_thread_reaches_the_consumer_and_threads_end():
    before = threading.active_count()
    with pytest.raises(DataError, match="shard 7 is gone"):
        next(iter(make(BrokenStore([[np.array([1, EOS])]]), prefetch_steps=1)))
    steps = iter(make(memory_store(LENGTHS), prefetch_steps=2))
    next(steps)
    steps.close()
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_packs": 6, "world_size": 4}, "global_packs is 6 for 4 ranks; it must be a positive multiple"),
        ({"global_packs": 0}, "global_packs is 0"),
        ({"rank": 2, "world_size": 2}, "rank 2 of world size 2"),
        ({"epochs": 0}, "epochs is 0"),
        ({"prefetch_steps": -1}, "prefetch_steps is -1"),
        ({"seq_len": 0}, "seq_len is 0"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ConfigError, match=message):
        make(memory_store([4]), **options)


def test_report():
    report = make(memory_store([8, 8, 40, 4]), window_tokens=1000).report()
    assert (report.documents, report.cut_documents, report.tokens, report.packs) == (4, 1, 60, 4)
    assert report.waste == pytest.approx(1 - 60 / 64)
    assert report.documents_per_pack == pytest.approx(6 / 4)
