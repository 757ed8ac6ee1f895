"""Rows that join and leave a loop at any step against the same rows alone, in float64."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from statex_dist.data.tokenizer import BytesTokenizer
from statex_dist.errors import CheckpointError
from statex_dist.inference import decoding
from statex_dist.inference.decoding import DecodingLoop, Row, Sampling
from statex_dist.inference.prefill import evaluating, read_contexts
from tests.evaluation.stand_ins import overflowing_model, tiny_model

TOKENIZER = BytesTokenizer()
SAMPLINGS = [
    Sampling(max_tokens=7, ignore_eos=True),
    Sampling(max_tokens=3, temperature=1.0),
    Sampling(max_tokens=9, temperature=2.0, top_k=50, until=("\x01",)),
    Sampling(max_tokens=1, temperature=0.7, top_p=0.9),
]


def request(number):
    rng = random.Random(number)
    context = [rng.randrange(256) for _ in range(rng.randrange(1, 20))]
    return context, Row(key=number, sampling=SAMPLINGS[number % 4], seed=number, position=len(context))


def join(model, loop, numbers):
    contexts, rows = zip(*(request(number) for number in numbers), strict=True)
    loop.add(rows, *read_contexts(model, contexts, segment_length=6))


def alone(model, number):
    loop = DecodingLoop(model, TOKENIZER)
    join(model, loop, [number])
    return collect(loop)[number]


def collect(loop, found=None):
    found = {} if found is None else found
    while len(loop):
        take_step(loop, found)
    return found


def take_step(loop, found):
    for progress in loop.step():
        text, tokens, _ = found.get(progress.key, ("", [], None))
        tokens = [*tokens, progress.token] if progress.token is not None else tokens
        assert progress.finish_reason is None or list(progress.tokens) == tokens
        found[progress.key] = (text + progress.text, tokens, progress.finish_reason)


@pytest.fixture(scope="module", params=["gla", "mamba2"])
def model(request):
    model = tiny_model(request.param).double().eval()
    with evaluating(model):
        yield model


@settings(max_examples=12, deadline=None)
@given(schedule=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=6), data=st.data())
def test_rows_that_come_and_go_say_what_they_say_alone(model, schedule, data):
    loop, found, dropped, number = DecodingLoop(model, TOKENIZER), {}, set(), 0
    for joining, steps in schedule:
        if joining:
            join(model, loop, range(number, number + joining))
            number += joining
        for _ in range(steps):
            take_step(loop, found)
        running = [n for n in range(number) if n not in dropped and found.get(n, (0, 0, None))[2] is None]
        leaving = data.draw(st.sets(st.sampled_from(running), max_size=1)) if running else set()
        loop.drop({*leaving, 99})
        dropped |= leaving
        assert len(loop) == len(running) - len(leaving)
    collect(loop, found)
    for n in range(number):
        text, tokens, reason = alone(model, n)
        if n in dropped:
            assert tokens[: len(found.get(n, ("", []))[1])] == found.get(n, ("", []))[1]
        else:
            assert found[n] == (text, tokens, reason)
    assert loop.state_bytes == 0


def test_a_mix_up_of_rows_would_be_seen(model, monkeypatch):
    """The control of the test above: states of another row after one has left give other tokens."""
    wanted = {n: alone(model, n) for n in range(8)}

    def turned(states, places):
        return take_rows(states, [*places[1:], places[0]])

    take_rows = decoding.take_rows
    monkeypatch.setattr(decoding, "take_rows", turned)
    loop = DecodingLoop(model, TOKENIZER)
    join(model, loop, range(8))
    assert collect(loop) != wanted


def test_states_that_are_handed_in_stay_as_they_are_and_the_loops_own_are_written_over(model):
    context, row = request(0)
    logits, states = read_contexts(model, [context], segment_length=6)
    before = [tuple(part.clone() for part in state) for state in states]
    loop = DecodingLoop(model, TOKENIZER)
    loop.add([row], logits, states)
    loop.step()
    places = [state[0].data_ptr() for state in loop._states]
    loop.step()
    for state, kept in zip(states, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(state, kept, strict=True))
    assert [state[0].data_ptr() for state in loop._states] == places, "no second copy of the states"


def test_bytes_of_states_are_those_of_the_rows(model):
    loop = DecodingLoop(model, TOKENIZER)
    join(model, loop, [0])
    one = loop.state_bytes
    join(model, loop, [4, 8])
    assert loop.state_bytes == 3 * one > 0


def test_a_row_that_is_not_finite_fails_alone_and_says_where():
    model = overflowing_model(1, 0)
    good, wanted = Row(key="good", sampling=Sampling(max_tokens=4, ignore_eos=True), position=2), []
    with evaluating(model):

        def run(rows):
            logits, states = read_contexts(model, [[9, 8], [7] * 5][: len(rows)], segment_length=8)
            if len(rows) == 2:
                logits[1] = torch.eye(258)[0]  # token 0 is said, and overflows
            loop = DecodingLoop(model, TOKENIZER)
            loop.add(rows, logits, states)
            steps = []
            while len(loop):
                steps.append(loop.step())
            return steps

        wanted = [progress.token for (progress,) in run([good])]
        steps = run([good, Row(key="bad", sampling=Sampling(max_tokens=4), position=5)])
    assert [step[0].token for step in steps] == wanted
    assert [len(step) for step in steps] == [2, 1, 1, 1]
    bad = steps[0][1]
    assert (bad.key, bad.finish_reason, list(bad.tokens)) == ("bad", "error", [0])
    assert isinstance(bad.error, CheckpointError)
    assert "layer 1 at position 5;" in str(bad.error)
