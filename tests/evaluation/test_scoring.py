"""Scores and texts of continuations against a plain forward pass over the whole, in float64."""

import random

import numpy as np
import pytest
import torch
from statex_dist.inference.generate import generate_continuations
from statex_dist.inference.sampling import Sampling

from statex_dist.data.tokenizer import BytesTokenizer
from statex_dist.errors import CheckpointError, ConfigError, DataError
from statex_dist.evaluation.scoring import score_continuations
from statex_dist.inference.prefill import read_contexts
from statex_dist.models.lm import LMOutput
from statex_dist.models.mitigation import parse_mitigation
from tests.evaluation.stand_ins import VOCAB, StandIn, overflowing_model, tiny_model

TOKENIZER = BytesTokenizer()


def some_tokens(rng, length):
    return [rng.randrange(256) for _ in range(length)]


def logits_of(model, tokens):
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0]


def plain_score(model, context, continuation):
    """One forward pass over everything, no state, no batch."""
    logits = logits_of(model, [*context, *continuation])[len(context) - 1 : -1]
    targets = torch.tensor(continuation)
    logprobs = logits.log_softmax(dim=-1).gather(1, targets[:, None])
    return logprobs.sum().item(), bool((logits.argmax(dim=-1) == targets).all())


def plain_greedy(model, context, num_tokens):
    tokens = list(context)
    for _ in range(num_tokens):
        tokens.append(int(logits_of(model, tokens)[-1].argmax()))
    return tokens[len(context) :]


@pytest.mark.parametrize("family", ["gla", "mamba2"])
@pytest.mark.parametrize(("batch_size", "segment_length"), [(1, 1024), (4, 5), (32, 16)])
def test_scores_are_those_of_one_pass_over_the_whole(family, batch_size, segment_length):
    model, rng = tiny_model(family).double().eval(), random.Random(0)
    contexts = [some_tokens(rng, n) for n in (1, 7, 7, 30, 41, 3)]
    requests = [(rng.choice(contexts), some_tokens(rng, rng.randrange(1, 40))) for _ in range(20)]
    requests.append((contexts[0], plain_greedy(model, contexts[0], 3)))
    found = dict(score_continuations(model, requests, batch_size=batch_size, segment_length=segment_length))
    assert sorted(found) == list(range(21))
    for i, (context, continuation) in enumerate(requests):
        logprob, is_greedy = plain_score(model, context, continuation)
        assert found[i].logprob == pytest.approx(logprob, abs=1e-10)
        assert found[i].is_greedy == is_greedy
    assert found[20].is_greedy


def test_each_row_keeps_the_state_of_its_own_last_token():
    model, rng = tiny_model().double().eval(), random.Random(1)
    contexts = [some_tokens(rng, n) for n in (5, 19, 1, 19, 8)]
    with torch.inference_mode():
        logits, states = read_contexts(model, contexts, segment_length=6)
        for row, context in enumerate(contexts):
            alone = model(torch.tensor([context]), output_states=True)
            torch.testing.assert_close(logits[row], alone.logits[0, -1])
            for state, wanted in zip(states, alone.states, strict=True):
                for tensor, expected in zip(state, wanted, strict=True):
                    torch.testing.assert_close(tensor[row], expected[0])


class Counting(StandIn):
    """Counts the tokens that it reads."""

    def __init__(self):
        super().__init__()
        self.read = 0

    def next_tokens(self, history):
        return torch.zeros_like(history)

    def forward(self, input_ids, **kwargs):
        self.read += input_ids.numel()
        return super().forward(input_ids, **kwargs)


def test_a_shared_context_is_read_once_and_in_segments():
    model, context = Counting(), [1] * 1000
    requests = [(context, [2, 3]), (context, [4, 5, 6]), (list(context), [7])]
    dict(score_continuations(model, requests, batch_size=2, segment_length=64))
    # Of a continuation all but the last token is read; the row of one token is filled up to the other's width.
    assert model.read <= 1000 + 2 * 2
    assert model.longest_call == 64
    model.read = 0
    sampling = Sampling(max_tokens=1, temperature=1.0)
    contexts = [context, context, context]
    dict(generate_continuations(model, contexts, sampling, tokenizer=TOKENIZER, batch_size=8, segment_length=64))
    assert model.read == 1000


@pytest.mark.parametrize("family", ["gla", "mamba2"])
def test_greedy_texts_are_those_of_the_whole_read_anew_for_each_token(family):
    model, rng = tiny_model(family).double().eval(), random.Random(2)
    contexts = [some_tokens(rng, n) for n in (9, 1, 30, 9)]
    sampling = Sampling(max_tokens=8)
    found = dict(generate_continuations(model, contexts, sampling, tokenizer=TOKENIZER, batch_size=3, segment_length=4))
    assert [found[i] for i in range(4)] == [TOKENIZER.decode(plain_greedy(model, c, 8)) for c in contexts]


def test_what_is_drawn_depends_on_the_seed_and_not_on_the_batch():
    model, rng = tiny_model().double().eval(), random.Random(3)
    contexts = [some_tokens(rng, n) for n in (9, 1, 30, 9)] * 2
    sampling = Sampling(max_tokens=6, temperature=1.5, top_k=200, top_p=0.99)

    def texts(batch_size, first_seed):
        seeds = [first_seed + i for i in range(8)]
        found = generate_continuations(
            model, contexts, sampling, tokenizer=TOKENIZER, batch_size=batch_size, segment_length=16, seeds=seeds
        )
        return [text for _, text in sorted(found)]

    assert texts(1, 0) == texts(8, 0) != texts(8, 100)


class Fixed(StandIn):
    """Says the same probabilities at every place."""

    def __init__(self, shares):
        super().__init__()
        self.logits = torch.full((VOCAB,), -torch.inf)
        self.logits[: len(shares)] = torch.tensor(shares).log()

    def forward(self, input_ids, **kwargs):
        logits = self.logits.expand(*input_ids.shape, VOCAB).clamp(min=-1e9)
        return LMOutput(logits=logits, states=[(input_ids[:, :1],)])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.1, 0.2, 0.3, 0.4]),
        ({"top_k": 2}, [0, 0, 3 / 7, 4 / 7]),
        ({"top_p": 0.75}, [0, 2 / 9, 3 / 9, 4 / 9]),
        ({"top_p": 0.4}, [0, 0, 0, 1]),
        ({"temperature": 0.5}, [1 / 30, 4 / 30, 9 / 30, 16 / 30]),
    ],
)
def test_draws_have_the_frequencies_asked_for(options, expected):
    sampling = Sampling(max_tokens=1, **{"temperature": 1.0, **options})
    found = generate_continuations(
        Fixed([0.1, 0.2, 0.3, 0.4]), [[1]] * 2000, sampling, tokenizer=TOKENIZER, batch_size=2000, segment_length=8
    )
    counts = np.bincount([ord(text) for _, text in found], minlength=4) / 2000
    np.testing.assert_allclose(counts, expected, atol=0.04)
    assert not counts[np.array(expected) == 0].any()


class Reciting(StandIn):
    """Goes on with a fixed text after a context of one token."""

    def __init__(self, tokens):
        super().__init__()
        self.said = tokens

    def next_tokens(self, history):
        return torch.tensor([self.said[min(i, len(self.said) - 1)] for i in range(len(history))])


@pytest.mark.parametrize(
    ("said", "until", "text", "steps"),
    [
        (b"one\n\nQ: two", ("\n\nQ:", "wo"), "one", 7),
        (b"one two", ("two", "e t"), "on", 5),
        ("né, then".encode(), ("é",), "n", 3),
        (b"no stop", ("never",), "no stopppp", 10),
        ([*b"ab", 256, *b"cd"], (), "ab", 3),
        (b"a.b", (".",), "a", 2),
    ],
)
def test_texts_end_before_the_first_stop_string_and_at_eos(said, until, text, steps):
    model = Reciting(list(said))
    sampling = Sampling(max_tokens=10, until=until)
    ((_, found),) = generate_continuations(model, [[1]], sampling, tokenizer=TOKENIZER, batch_size=1, segment_length=8)
    assert found == text
    # Nothing is computed after the stop.
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    dict(generate_continuations(model, [[1]], sampling, tokenizer=TOKENIZER, batch_size=1, segment_length=8))
    assert len(calls) == steps


def test_bad_requests_are_refused():
    model = tiny_model()
    options = {"batch_size": 1, "segment_length": 8}
    with pytest.raises(DataError, match="request 1 has an empty continuation"):
        list(score_continuations(model, [([1], [2]), ([1], [])], **options))
    with pytest.raises(DataError, match="request 0 has an empty context"):
        list(score_continuations(model, [([], [2])], **options))
    with pytest.raises(DataError, match="a request holds token 300, the model's vocabulary ends at 257"):
        list(score_continuations(model, [([1], [300])], **options))
    with pytest.raises(DataError, match="a context is empty"):
        list(generate_continuations(model, [[]], Sampling(max_tokens=1), tokenizer=TOKENIZER, **options))
    with pytest.raises(ConfigError, match="max_tokens must be 1 or more, not 0"):
        Sampling(max_tokens=0)
    with pytest.raises(ConfigError, match="temperature 1, top_k 0 and top_p 0 make no sampling"):
        Sampling(max_tokens=1, temperature=1.0, top_p=0.0)
    with torch.no_grad():
        model.trunk.layers[1].mlp.down_proj.weight.fill_(torch.nan)
    with pytest.raises(CheckpointError, match="first in layer 1 at position 0"):
        list(score_continuations(model, [([1, 2], [2])], **options))


def test_a_shared_state_before_the_contexts_is_as_if_they_began_with_it():
    model, rng = tiny_model().double().eval(), random.Random(4)
    before, contexts = some_tokens(rng, 11), [some_tokens(rng, n) for n in (3, 9, 1)]
    requests = [(context, some_tokens(rng, 5)) for context in contexts for _ in range(2)]
    options = {"batch_size": 2, "segment_length": 4}
    wholes = [(before + context, continuation) for context, continuation in requests]
    wanted = dict(score_continuations(model, wholes, **options))
    with torch.inference_mode():
        start = model(torch.tensor([before]), output_states=True).states
    for _ in range(2):  # it is left as it is
        found = dict(score_continuations(model, requests, start=start, position=11, **options))
        for number, score in wanted.items():
            assert found[number].logprob == pytest.approx(score.logprob, abs=1e-10)


def test_what_is_not_finite_is_named_at_its_place_in_its_own_text():
    model, options = overflowing_model(1, 77), {"batch_size": 4, "segment_length": 8}
    bad = "first in layer 1 at position {};".format
    requests = [([1] * 20, [5, 6, 7]), ([2] * 50, [5, 77, 6]), ([3] * 30, [5] * 9)]
    with pytest.raises(CheckpointError, match=bad(51)):
        list(score_continuations(model, requests, **options))
    with pytest.raises(CheckpointError, match=bad(151)):
        list(score_continuations(model, requests, position=100, **options))
    with pytest.raises(CheckpointError, match=bad(30 + 8)):
        list(score_continuations(model, [*requests[::2], ([3] * 30, [5] * 8 + [77, 6])], **options))
    # Nothing is read of the last token, nor of what a shorter row is filled up with.
    model = overflowing_model(1, 0)
    assert len(list(score_continuations(model, [([1] * 20, [5, 0]), ([1] * 20, [5] * 9)], **options))) == 2

    model = overflowing_model(1, 77)
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every token alike: the first id is said
        model.trunk.embedding_table.weight[0, 0] = 1e6
    contexts = [[1] * 20, [2] * 33]
    with pytest.raises(CheckpointError, match=bad(20)):
        list(generate_continuations(model, contexts[:1], Sampling(max_tokens=3), tokenizer=TOKENIZER, **options))
    with pytest.raises(CheckpointError, match=r"at position (33|20);"):
        list(generate_continuations(model, contexts, Sampling(max_tokens=3), tokenizer=TOKENIZER, **options))


def test_a_state_brought_back_at_every_token_gives_the_same_scores_in_any_batch():
    model, rng = tiny_model().double().eval(), random.Random(5)
    requests = [(some_tokens(rng, n), some_tokens(rng, 3)) for n in (40, 37, 23, 11)]

    def scores(batch_size):
        found = score_continuations(model, requests, batch_size=batch_size, segment_length=16)
        return [score.logprob for _, score in sorted(found)]

    plain = scores(4)
    model.mitigation = parse_mitigation("state-norm:limit=0.001,every=1")
    assert scores(4) == pytest.approx(scores(1), abs=1e-12)
    assert scores(4) != pytest.approx(plain, abs=1e-9)
