"""Continuous batching, step by step: which prompt is read when, which rows join and leave; answers do not show it."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from statex_dist.data.tokenizer import BytesTokenizer
from statex_dist.inference import decoding
from statex_dist.inference.decoding import Row, Sampling
from statex_dist.inference.prefill import evaluating
from statex_dist.inference.rows import take_rows
from statex_dist.inference.serving.batch import MAX_PASSES, ContinuousBatch, Prompt
from statex_dist.inference.text import cut
from tests.evaluation.stand_ins import overflowing_model, tiny_model
from tests.inference.serving.running import SEGMENT, alone

LONG = 10 * SEGMENT


@functools.cache
def exact_model():
    """A model whose answers do not depend on rounding, as they would where rows are added up in another order."""
    return tiny_model().double()


def make_batch(model=None, max_rows=4):
    return ContinuousBatch(model or exact_model(), BytesTokenizer(), max_rows=max_rows, segment_length=SEGMENT)


def make_prompt(key, length=1, *, n=1, seed=0, first=0, **sampling):
    sampling = Sampling(**{"max_tokens": 3, "temperature": 1.0, "ignore_eos": True, **sampling})
    rows = [Row(key=(key, i), sampling=sampling, seed=seed + i, position=length) for i in range(n)]
    return Prompt(tokens=[(first + 7 * i) % 256 for i in range(length)], rows=rows)


def run_schedule(batch, arrivals, leavers=()):
    """Let prompts arrive at turns and rows leave at turns; return the last progress of every row that ended."""
    waiting, ended, turn = sorted(arrivals, key=lambda arrival: arrival[0]), {}, 0
    with evaluating(exact_model()):
        while waiting or batch.running or batch.reading:
            batch.drop({key for at, key in leavers if at == turn})
            while waiting and waiting[0][0] <= turn and batch.free > 0:
                batch.admit(waiting.pop(0)[1])
            done = batch.step()
            assert done.rows <= 4
            for progress in done.progress:
                if progress.finish_reason is not None:
                    ended[progress.key] = progress
            turn += 1
            assert turn < 1000
    return ended


def text_of(progress, row):
    return cut(BytesTokenizer().decode(progress.tokens), row.sampling.until)


@functools.cache
def expected(length, first, max_tokens, temperature, seed):
    prompt = make_prompt(0, length, first=first, max_tokens=max_tokens, temperature=temperature, ignore_eos=False)
    return alone(exact_model(), prompt.tokens, prompt.rows[0].sampling, seed)


REQUESTS = st.tuples(
    st.integers(0, 6),  # turn of arrival
    st.sampled_from([1, 2, 5, 16, 17, 40]),  # tokens
    st.sampled_from([0, 3]),  # first token
    st.sampled_from([1, 4, 9]),  # max_tokens
    st.sampled_from([0.0, 1.0]),  # temperature
    st.sampled_from([1, 2, 5]),  # n
)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(requests=st.lists(REQUESTS, min_size=1, max_size=9), leaver=st.tuples(st.integers(0, 9), st.integers(0, 8)))
def test_every_answer_is_that_of_the_prompt_alone_whoever_joins_and_leaves(requests, leaver):
    arrivals = [
        (at, make_prompt(i, length, first=first, max_tokens=count, temperature=heat, n=n, ignore_eos=False))
        for i, (at, length, first, count, heat, n) in enumerate(requests)
    ]
    ended = run_schedule(make_batch(), arrivals, [(leaver[0], (leaver[1], 0))])
    keys = {row.key for _, prompt in arrivals for row in prompt.rows}
    assert keys - set(ended) <= {(leaver[1], 0)}
    for (i, choice), progress in ended.items():
        _, length, first, count, heat, _ = requests[i]
        row = arrivals[i][1].rows[choice]
        assert text_of(progress, row) == expected(length, first, count, heat, choice)


CROWD = [(i // 2, make_prompt(i, 5 + i, seed=i, max_tokens=2 + i, first=i)) for i in range(8)]


def crowd_matches():
    ended = run_schedule(make_batch(), CROWD)
    rows = {row.key: (prompt, row) for _, prompt in CROWD for row in prompt.rows}
    return [
        text_of(progress, rows[key][1]) == alone(exact_model(), rows[key][0].tokens, rows[key][1].sampling, key[0])
        for key, progress in ended.items()
    ]


def test_the_comparison_would_see_states_that_change_hands(monkeypatch):
    """A negative control: a crowd is answered right, and wrong where rows get each other's states."""
    assert crowd_matches() == [True] * 8

    def turned(states, rows):
        return [tuple(part.roll(1, 0) for part in state) for state in take_rows(states, rows)]

    monkeypatch.setattr(decoding, "take_rows", turned)
    assert not all(crowd_matches())


def test_a_long_prompt_holds_up_running_rows_by_a_segment_a_turn():
    batch = make_batch()
    batch.admit(make_prompt("running", max_tokens=100))
    with evaluating(exact_model()):
        batch.step()
        batch.admit(make_prompt("long", LONG))
        turns = [batch.step() for _ in range(10)]
    assert [turn.tokens_read for turn in turns] == [SEGMENT] * 10
    assert all(any(progress.key == ("running", 0) for progress in turn.progress) for turn in turns)
    assert [turn.rows for turn in turns] == [1] * 9 + [2]


def test_a_short_prompt_overtakes_a_long_one_in_reading():
    batch = make_batch()
    batch.admit(make_prompt("long", LONG))
    batch.admit(make_prompt("short", 3, max_tokens=2))
    with evaluating(exact_model()):
        ended = [
            progress.key for _ in range(4) for progress in batch.step().progress if progress.finish_reason is not None
        ]
    assert ended == [("short", 0)]
    assert batch.reading == 1


def test_short_prompts_are_read_several_a_turn_within_bounds():
    batch = make_batch(max_rows=20)
    for i in range(10):
        batch.admit(make_prompt(i))
    with evaluating(exact_model()):
        assert [batch.step().tokens_read for _ in range(2)] == [MAX_PASSES, 10 - MAX_PASSES]
    batch.drop({(i, 0) for i in range(10)})
    for i in range(3):
        batch.admit(make_prompt(i, 6))
    with evaluating(exact_model()):
        assert [batch.step().tokens_read for _ in range(2)] == [12, 6]  # three would be more than a segment


def test_all_completions_of_a_prompt_share_one_reading():
    batch = make_batch()
    batch.admit(make_prompt("both", 9, n=3, max_tokens=4))
    with evaluating(exact_model()):
        turns = [batch.step() for _ in range(4)]
    assert sum(turn.tokens_read for turn in turns) == 9
    texts = {tuple(progress.tokens) for progress in turns[-1].progress}
    assert len(texts) == 3


def test_rows_start_as_slots_come_free_and_nobody_passes_them():
    batch = make_batch()
    batch.admit(make_prompt("first", n=2, max_tokens=3))
    with evaluating(exact_model()):
        batch.step()
        batch.admit(make_prompt("long", 3 * SEGMENT, max_tokens=3))
        batch.admit(make_prompt("wide", 2, n=3, max_tokens=4))
        assert batch.free == -2
        turns = [[progress.key for progress in batch.step().progress] for _ in range(6)]
    long, wide, first = ("long", 0), [("wide", i) for i in range(3)], [("first", i) for i in range(2)]
    assert turns[:2] == [first, [*first, wide[0]]]
    # "long" has the slot that it was promised, though "wide", behind it, was read before.
    assert turns[2:] == [wide, [*wide, long], [*wide, long], [*wide[1:], long]]
    assert (batch.free, batch.reading, batch.running) == (4, 0, 0)


def test_slots_and_bytes_are_counted():
    batch = make_batch()
    batch.admit(make_prompt("long", LONG, n=2))
    batch.admit(make_prompt("short"))
    assert (batch.free, batch.reading, batch.running) == (1, 3, 0)
    with evaluating(exact_model()):
        batch.step()
        batch.step()  # the short one is read behind the first segment of the long one, and writes
    assert (batch.free, batch.reading, batch.running) == (1, 2, 1)
    one = batch.state_bytes
    assert one > 0
    batch.drop({("long", 0)})
    assert (batch.free, batch.reading) == (2, 1)
    batch.drop({("long", 1), ("never", 0)})
    assert (batch.free, batch.reading) == (3, 0)
    batch.admit(make_prompt("other", 2))
    with evaluating(exact_model()):
        batch.step()
    assert batch.state_bytes == 2 * one
    batch.drop({("short", 0), ("other", 0)})
    assert (batch.free, batch.state_bytes) == (4, 0)


def test_the_place_of_numbers_that_are_not_finite_counts_all_segments():
    tokens = [1] * (SEGMENT + 3) + [200, 1]
    batch = make_batch(overflowing_model(1, token=200))
    batch.admit(Prompt(tokens=tokens, rows=make_prompt("ill").rows))
    with evaluating(exact_model()):
        [], [progress] = (batch.step().progress for _ in range(2))
    assert f"layer 1 at position {SEGMENT + 3}" in str(progress.error)
    assert (batch.reading, batch.free) == (0, 4)


@pytest.mark.parametrize("where", ["prompt", "completion"])
def test_numbers_that_are_not_finite_fail_one_row_alone(where):
    model = overflowing_model(1, token=200)
    well = make_prompt("well", 5, max_tokens=8, temperature=0)
    if where == "prompt":
        ill = Prompt(tokens=[1, 200, 3], rows=make_prompt("ill", n=2).rows)
    else:
        # All tokens are as likely: 200 comes sooner or later.
        with torch.no_grad():
            model.lm_head.weight.zero_()
        ill = make_prompt("ill", 5, temperature=1.0, max_tokens=4096)
    batch = make_batch(model, max_rows=4)
    batch.admit(well)
    batch.admit(ill)
    ended = {}
    with evaluating(model):
        while batch.running or batch.reading:
            ended |= {p.key: p for p in batch.step().progress if p.finish_reason is not None}
    assert ended["well", 0].finish_reason == "length"
    failed = {key for key, progress in ended.items() if progress.finish_reason == "error"}
    assert failed == {row.key for row in ill.rows}
    assert "layer 1 at position" in str(ended["ill", 0].error)
