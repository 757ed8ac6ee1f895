import gc
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from statex_dist.batch import IGNORE_INDEX, PackedBatch
from statex_dist.data.formats import open_store
from statex_dist.data.loader import PackedLoader, StepShare
from statex_dist.errors import ConfigError, DataError
from tests.raising import raises

from .options import make_loader
from .synthetic import EOS, PAD, MemoryStore, all_documents, make_documents, memory_store, write_mds

FIELDS = ("input_ids", "labels", "position_ids", "cu_seqlens", "seq_idx")


def make(store, **options) -> PackedLoader:
    settings = {"seq_len": 16, "global_packs": 4, "pad_id": PAD, "window_tokens": 100, "prefetch_steps": 0}
    return make_loader(store, **settings | options)


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
        packs.append([as_lists(batch) for batches in per_rank for batch in batches if not batch.dummy])
        assert len({len(batches) for batches in per_rank}) == 1, "all ranks make the same number of passes"
        found = [batch.loader_state for batches in per_rank for batch in batches]
        assert all(s == found[0] == loaders[0].state_dict() for s in found)
        states.append(found[0])
    return packs, states


def at(state):
    source = state["sources"]["data"]
    return source["epoch"], source["window"], source["taken"]


@given(st.integers(1, 300).flatmap(lambda packs: st.tuples(st.just(packs), st.integers(1, packs))))
def test_every_rank_has_neighbouring_packs_and_at_most_one_more_than_another(sizes: tuple[int, int]):
    packs, world_size = sizes
    shares = [StepShare(global_packs=packs, rank=rank, world_size=world_size) for rank in range(world_size)]
    own = [range(packs)[share.mine] for share in shares]
    assert [pack for run in own for pack in run] == list(range(packs))
    counts = [len(run) for run in own]
    assert min(counts) >= 1
    assert max(counts) - min(counts) <= 1
    assert {count + share.num_dummies for count, share in zip(counts, shares, strict=True)} == {max(counts)}


def test_a_dummy_has_no_target_and_the_state_of_its_step():
    store = memory_store(LENGTHS)
    options = {"long_documents": "carry", "num_workers": 0}
    for rank in range(3):
        for batches in itertools.islice(make(store, rank=rank, world_size=3, **options), 12):
            own = [batch for batch in batches if not batch.dummy]
            assert [batch.dummy for batch in batches] == [False] * len(own) + [True] * (2 - len(own))
            for dummy in batches[len(own) :]:
                assert (dummy.num_target_tokens, dummy.num_tokens) == (0, own[-1].num_tokens)
                assert (dummy.carried, dummy.continues, dummy.lost_tokens) == (False, False, 0)
                assert dummy.loader_state == own[-1].loader_state


LENGTHS = [3, 40, 7, 16, 2, 9, 30, 5, 12, 17, 33, 4, 8, 21, 6, 11, 2, 14, 19, 10]


@pytest.mark.parametrize("packing", ["best_fit", "concat", "one_document"])
def test_same_packs_in_the_same_order_at_any_world_size(packing):
    store = memory_store(LENGTHS)
    one, states = global_stream(store, 1, 20, packing=packing)
    for world_size in (2, 3, 4):
        assert global_stream(store, world_size, 20, packing=packing) == (one, states)
    assert at(states[-1])[0] >= 2


def test_resume_at_every_point_twice_and_on_another_world_size():
    store = memory_store(LENGTHS)
    whole, states = global_stream(store, 2, 16, global_packs=4)
    assert at(states[-4])[0] >= 1  # the cut points below lie in several windows and epochs
    assert {at(state)[1] for state in states} >= {0, 1, 2}
    for step, state in enumerate(states[:-3]):
        for world_size in (1, 3, 4):
            tail, tail_states = global_stream(store, world_size, 1, state)
            assert tail == whole[step + 1 : step + 2]
            again, _ = global_stream(store, world_size, 2, tail_states[-1])
            assert again == whole[step + 2 : step + 4]


def test_resume_exactly_at_window_and_epoch_borders():
    store = memory_store([16] * 12, shards=3)  # 12 packs, 4 to a window of 64 tokens
    whole, states = global_stream(store, 1, 9, window_tokens=64)
    assert [at(s) for s in states[:3]] == [(0, 1, []), (0, 2, []), (1, 0, [])]
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
    plan, seq_len = loader.mixture.plans["data"], loader.mixture.stages[0].seq_len
    windows = [plan.window(0, w, seq_len) for w in range(plan.num_windows(0))]
    return [window.pieces(p) for window in windows for p in range(len(window))]


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
    assert at(loader.state_dict())[0] == 1
    assert list(loader) == []  # resumed at its end, a run has nothing left
    assert len(list(make({"books": store}, epochs=1))) == 2


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
    rest = next(iter(loader))  # a new iterator continues after the current step
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


def mds_store(tmp_path, lengths=LENGTHS * 20, **options):
    return reopened(write_mds(tmp_path / "ds", make_documents(lengths), **options))


def reopened(path):
    return open_store(path, cache_dir=path.parent / "cache")


@pytest.mark.parametrize("packing", ["best_fit", "concat"])
def test_workers_change_nothing(tmp_path, packing):
    store = mds_store(tmp_path)
    options = {"packing": packing, "seq_len": 64, "window_tokens": 1000}
    whole, states = global_stream(store, 1, 30, **options)
    assert at(states[-1])[0] >= 1
    assert global_stream(store, 2, 30, num_workers=4, **options) == (whole, states)
    for step in (0, 7, 20):  # resumed with workers running, twice, on other counts
        head, further = global_stream(store, 4, 3, states[step], num_workers=1, **options)
        tail, _ = global_stream(store, 2, 3, further[-1], num_workers=2, **options)
        assert head + tail == whole[step + 1 : step + 7]


def test_a_lock_that_a_killed_worker_held_does_not_hold_up_the_end(tmp_path, monkeypatch):
    """Workers check an event at intervals, under its lock; a worker that is killed then never releases the lock."""
    iterators = []
    begin = _MultiProcessingDataLoaderIter.__init__

    def recorded(self, loader):
        iterators.append(weakref.ref(self))
        begin(self, loader)

    monkeypatch.setattr(_MultiProcessingDataLoaderIter, "__init__", recorded)
    steps = iter(make(mds_store(tmp_path), num_workers=2))
    next(steps)
    iterators[0]()._workers_done_event._cond.acquire()
    ending = threading.Thread(target=steps.close, daemon=True)
    ending.start()
    ending.join(60)
    assert not ending.is_alive()


def test_a_state_loaded_under_running_workers_moves_them(tmp_path):
    store = mds_store(tmp_path)
    whole, states = global_stream(store, 1, 12)
    loader = make(store, num_workers=2)
    steps = iter(loader)
    for _ in range(2):
        next(steps)
    loader.load_state_dict(states[8])
    assert [as_lists(b) for b in next(steps)] == whole[9]
    steps.close()
    assert loader.state_dict() == states[9]


def children() -> set[int]:
    return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}


def test_workers_end_with_their_iterator_and_leave_no_shared_memory(tmp_path):
    before = children()
    steps = iter(make(mds_store(tmp_path), num_workers=3))
    next(steps)
    workers = children() - before
    assert len(workers) == 3
    steps.close()
    del steps
    gc.collect()
    assert children() <= before
    assert not [p for p in Path("/dev/shm").iterdir() if any(f"torch_{pid}_" in p.name for pid in workers)]


def test_a_killed_worker_is_an_error_not_a_hang(tmp_path):
    before = children()
    steps = iter(make(mds_store(tmp_path), num_workers=2))
    next(steps)
    for pid in children() - before:
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(DataError, match="data worker"):
        list(itertools.islice(steps, 100))


ENDLESS = """
import json, sys, time
from statex_dist.data.formats import open_store
from tests.data.options import make_loader
store = open_store(sys.argv[1], cache_dir=sys.argv[2])
loader = make_loader(store, seq_len=64, global_packs=4, pad_id=257, window_tokens=1000, num_workers=2)
for batches in loader:
    print(json.dumps(batches[0].loader_state), flush=True)
    time.sleep(0.02)
"""


def test_kill_9_leaves_nothing_behind_and_the_next_start_goes_on(tmp_path):
    """The main process is killed with its workers running: they end, and no lock or shared memory is left."""
    path = write_mds(tmp_path / "ds", make_documents(LENGTHS * 20), compression="zstd")
    whole, states = global_stream(reopened(path), 1, 20, seq_len=64, window_tokens=1000)
    arguments = [sys.executable, "-c", ENDLESS, str(path), str(tmp_path / "cache")]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    seen = [json.loads(process.stdout.readline()) for _ in range(5)]
    workers = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    process.kill()
    process.wait()
    assert seen == states[:5]
    assert len(workers) >= 2
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline, "workers outlive the killed process"
        time.sleep(0.1)
    pids = [process.pid, *workers]
    assert not [p for p in Path("/dev/shm").iterdir() if any(f"torch_{pid}_" in p.name for pid in pids)]
    assert global_stream(reopened(path), 2, 3, seen[-1], seq_len=64, window_tokens=1000)[0] == whole[5:8]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", ["missing", "truncated", "altered"])
def test_a_bad_shard_is_named_whoever_reads_it(tmp_path, workers, damage):
    mds_store(tmp_path)  # its list of lengths is made from whole shards
    shard = tmp_path / "ds" / "shard.00002.mds"
    content = bytearray(shard.read_bytes())
    if damage == "missing":
        shard.unlink()
    else:
        content[-1] ^= 1
        shard.write_bytes(content[:-10] if damage == "truncated" else content)
    with pytest.raises(DataError, match=r"shard\.00002\.mds"):
        list(make(reopened(tmp_path / "ds"), num_workers=workers, epochs=1))


@pytest.mark.parametrize("workers", [0, 2])
def test_skip_corrupt_keeps_the_stream_and_counts_what_was_lost(tmp_path, workers, caplog):
    whole, states = global_stream(mds_store(tmp_path), 1, 40, epochs=1)
    (tmp_path / "ds" / "shard.00001.mds").unlink()
    store = reopened(tmp_path / "ds")
    loader = make(store, epochs=1, skip_corrupt=True, num_workers=workers, prefetch_steps=1)
    specs = [spec for _, of_step in loader._planned() for spec in of_step]
    batches = [batch for step in loader for batch in step]
    assert [batch.loader_state for batch in batches[::4]][: len(states)] == states
    # Nothing but the shard's own tokens is missing, and where they were nothing is learned.
    lost = 0
    for spec, batch, before in zip(specs, batches, [pack for step in whole for pack in step], strict=False):
        ids, labels, *layout = as_lists(batch)
        assert layout == before[2:]
        for (shard, *_), begin, end in zip(spec.pieces, layout[1], layout[1][1:], strict=False):
            if shard == 1:
                lost += end - begin
                assert ids[0][begin:end] == [PAD] * (end - begin)
                assert labels[0][begin:end] == [IGNORE_INDEX] * (end - begin)
            else:
                assert ids[0][begin:end] == before[0][0][begin:end]
                assert labels[0][begin:end] == before[1][0][begin:end]
    assert sum(batch.lost_tokens for batch in batches) == loader.lost_tokens >= lost >= store.num_tokens(1)
    if not workers:
        assert [r.message for r in caplog.records if "skipped a shard" in r.message and "shard.00001.mds" in r.message]


def test_ids_beyond_the_vocabulary_name_their_document(tmp_path):
    documents = make_documents([20] * 6)
    documents[4][7] = 300
    store = reopened(write_mds(tmp_path / "ds", documents, shard_bytes=1 << 20))
    assert len(list(make(store, epochs=1, vocab_size=301)))
    with raises(DataError, "ds/shard.00000.mds", "document 4", "300", "token 7"):
        list(make(store, epochs=1, vocab_size=258))


def test_empty_documents_are_left_out():
    store = MemoryStore([[np.arange(n) for n in (0, 5, 0, 9, 0)], [np.arange(0)]])
    (batches,) = make(store, epochs=1, global_packs=1)
    assert sorted(np.diff(batches[0].cu_seqlens).tolist()) == [2, 5, 9]


def test_carried_pieces_say_so_on_both_sides():
    store = memory_store([70, 20, 5, 40, 33, 16, 16, 8], shards=1)
    options = {"long_documents": "carry", "global_packs": 2, "window_tokens": 1000, "epochs": 1, "prefetch_steps": 0}
    steps = list(make(store, **options))
    lanes = list(zip(*steps, strict=True))
    assert sum(batch.carried for lane in lanes for batch in lane) >= 3
    for lane in lanes:
        for before, after in itertools.pairwise(lane):
            assert before.continues == after.carried
            if after.carried:  # the target of the last token is the first token of the lane's next pack
                assert before.labels[0, -1] == after.input_ids[0, 0]
    again = [make(store, rank=r, world_size=2, **options) for r in (0, 1)]
    for lane, loader in zip(lanes, again, strict=True):
        assert [as_lists(b) for (b,) in loader] == [as_lists(b) for b in lane]


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
        ({"global_packs": 3, "world_size": 4}, "global_packs.* 3 for 4 ranks"),
        ({"global_packs": 0}, "global_packs is 0"),
        ({"rank": 2, "world_size": 2}, "rank 2.*size 2"),
        ({"epochs": 0}, "epochs is 0"),
        ({"prefetch_steps": -1}, "prefetch_steps is -1"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"num_workers": 100_000}, "num_workers.*is 100000"),
        ({"seq_len": 0}, "seq_len is 0"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ConfigError, match=message):
        make(memory_store([4]), **options)


def test_report():
    report = make(memory_store([8, 8, 40, 4]), window_tokens=1000).report()["data"]
    assert (report.documents, report.cut_documents, report.tokens, report.packs) == (4, 1, 60, 4)
    assert report.waste == pytest.approx(1 - 60 / 64)
    assert report.documents_per_pack == pytest.approx(6 / 4)
