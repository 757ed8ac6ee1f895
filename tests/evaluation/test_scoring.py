"""Scores of continuations against a plain forward pass over the whole, in float64."""

import random

import pytest
import torch

from statex_dist.data.tokenizer import BytesTokenizer
from statex_dist.errors import CheckpointError, DataError
from statex_dist.evaluation.scoring import score_continuations
from statex_dist.inference.decoding import Sampling
from statex_dist.inference.generate import generate_continuations
from statex_dist.models.mitigation import parse_mitigation
from tests.evaluation.stand_ins import StandIn, overflowing_model, tiny_model

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


def test_bad_requests_are_refused():
    model = tiny_model()
    options = {"batch_size": 1, "segment_length": 8}
    with pytest.raises(DataError, match="request 1"):
        list(score_continuations(model, [([1], [2]), ([1], [])], **options))
    with pytest.raises(DataError, match="request 0"):
        list(score_continuations(model, [([], [2])], **options))
    with pytest.raises(DataError, match=r"300.*257"):
        list(score_continuations(model, [([1], [300])], **options))
    with pytest.raises(DataError, match="context"):
        list(generate_continuations(model, [[]], Sampling(max_tokens=1), tokenizer=TOKENIZER, **options))
    with torch.no_grad():
        model.trunk.layers[1].mlp.down_proj.weight.fill_(torch.nan)
    with pytest.raises(CheckpointError, match=r"layer 1.*position 0"):
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
    bad = "layer 1 .* {};".format
    requests = [([1] * 20, [5, 6, 7]), ([2] * 50, [5, 77, 6]), ([3] * 30, [5] * 9)]
    with pytest.raises(CheckpointError, match=bad(51)):
        list(score_continuations(model, requests, **options))
    with pytest.raises(CheckpointError, match=bad(151)):
        list(score_continuations(model, requests, position=100, **options))
    with pytest.raises(CheckpointError, match=bad(30 + 8)):
        list(score_continuations(model, [*requests[::2], ([3] * 30, [5] * 8 + [77, 6])], **options))
    # Neither the last token nor the padding of a shorter row affects a score.
    model = overflowing_model(1, 0)
    assert len(list(score_continuations(model, [([1] * 20, [5, 0]), ([1] * 20, [5] * 9)], **options))) == 2

    model = overflowing_model(1, 77)
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every token alike: the first id is said
        model.trunk.embedding_table.weight[0, 0] = 1e6
    contexts = [[1] * 20, [2] * 33]
    with pytest.raises(CheckpointError, match=r"layer 1.*position 20"):
        list(generate_continuations(model, contexts[:1], Sampling(max_tokens=3), tokenizer=TOKENIZER, **options))
    with pytest.raises(CheckpointError, match=r"position (33|20)"):
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
