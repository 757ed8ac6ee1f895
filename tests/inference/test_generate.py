"""Texts, whole and as they come, against a plain forward pass over everything, in float64."""

import random

import numpy as np
import pytest
import torch

from statex_dist.data.tokenizer import BytesTokenizer
from statex_dist.errors import CheckpointError, DataError
from statex_dist.inference.decoding import Sampling
from statex_dist.inference.generate import generate_continuations, read_prefix, stream_continuations
from statex_dist.inference.prefill import evaluating, read_contexts
from statex_dist.models.lm import LMOutput
from statex_dist.models.mitigation import parse_mitigation
from tests.evaluation.stand_ins import VOCAB, StandIn, overflowing_model, tiny_model
from tests.models.tiny import CONFIGS, build

TOKENIZER = BytesTokenizer()


def some_tokens(rng, length, vocab=256):
    return [rng.randrange(vocab) for _ in range(length)]


def logits_of(model, tokens):
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0]


def plain_greedy(model, context, num_tokens):
    tokens = list(context)
    for _ in range(num_tokens):
        tokens.append(int(logits_of(model, tokens)[-1].argmax()))
    return tokens[len(context) :]


REMEDIES = ["forget-more:decay=0.1", "state-norm:limit=0.5,every=1", "sliding-window:tokens=5"]


@pytest.mark.parametrize("remedy", [None, *REMEDIES])
@pytest.mark.parametrize("name", CONFIGS)
def test_prompts_of_unequal_length_then_steps_equal_one_pass_over_the_whole(name, remedy):
    if remedy is not None and remedy.startswith("sliding") and name.startswith(("kda", "gated_deltanet")):
        pytest.skip("the delta rule has no sliding window")
    model, rng = build(CONFIGS[name]).eval(), random.Random(0)
    model.mitigation = None if remedy is None else parse_mitigation(remedy)
    contexts = [some_tokens(rng, length, vocab=40) for length in (11, 3, 1, 11, 7)]
    with evaluating(model):
        logits, states = read_contexts(model, contexts, segment_length=4)
        produced = [list(context) for context in contexts]
        for _ in range(4):
            for row, tokens in enumerate(produced):
                whole = model(torch.tensor([tokens])).logits[0, -1]
                assert (logits[row] - whole).abs().max() < 1e-9 * whole.abs().max()
            chosen = logits.argmax(dim=-1)
            for tokens, token in zip(produced, chosen.tolist(), strict=True):
                tokens.append(token)
            output = model(chosen[:, None], states=states, output_states=True, overwrite_states=True, logits_to_keep=1)
            logits, states = output.logits[:, -1], output.states


@pytest.mark.parametrize("family", ["gla", "mamba2"])
def test_greedy_texts_are_those_of_the_whole_read_anew_for_each_token(family):
    model, rng = tiny_model(family).double().eval(), random.Random(2)
    contexts = [some_tokens(rng, n) for n in (9, 1, 30, 9)]
    sampling = Sampling(max_tokens=8)
    found = dict(generate_continuations(model, contexts, sampling, tokenizer=TOKENIZER, batch_size=3, segment_length=4))
    assert [found[i] for i in range(4)] == [TOKENIZER.decode(plain_greedy(model, c, 8)) for c in contexts]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_pieces_of_text_make_up_the_whole_text_and_name_their_end(batch_size):
    model, rng = tiny_model().double().eval(), random.Random(7)
    contexts = [some_tokens(rng, n) for n in (9, 1, 30, 9)]
    options = {"tokenizer": TOKENIZER, "batch_size": batch_size, "segment_length": 8}
    sampling = Sampling(max_tokens=12, temperature=1.3, until=("e",))
    pieces, ends = ["", "", "", ""], {}
    for progress in stream_continuations(model, contexts, sampling, **options):
        assert progress.key not in ends
        pieces[progress.key] += progress.text
        if progress.finish_reason is not None:
            ends[progress.key] = progress
    assert dict(enumerate(pieces)) == dict(generate_continuations(model, contexts, sampling, **options))
    for number, end in ends.items():
        assert end.finish_reason == ("length" if len(end.tokens) == 12 and "e" not in pieces[number] else "stop")


def test_a_prefix_is_read_once_and_may_be_all_there_is():
    model, rng = tiny_model("mamba2").double().eval(), random.Random(8)
    before, contexts = some_tokens(rng, 13), [some_tokens(rng, 4), [], some_tokens(rng, 2), []]
    options = {"tokenizer": TOKENIZER, "batch_size": 8, "segment_length": 5}
    sampling = Sampling(max_tokens=6, ignore_eos=True)
    wholes = [before + context for context in contexts]
    wanted = dict(generate_continuations(model, wholes, sampling, **options))
    prefix = read_prefix(model, before[:9], segment_length=4)
    prefix = read_prefix(model, before[9:], segment_length=4, prefix=prefix)
    assert prefix.num_tokens == 13
    assert read_prefix(model, [], prefix=prefix) is prefix
    for _ in range(2):  # it is left as it is
        found = {}
        for progress in stream_continuations(model, contexts, sampling, prefix=prefix, **options):
            found[progress.key] = found.get(progress.key, "") + progress.text
        assert found == wanted
    alone = [p.text for p in stream_continuations(model, [[]], sampling, prefix=prefix, **options)]
    assert "".join(alone) == wanted[1]


def test_the_position_of_what_is_not_finite_counts_the_prefix():
    model = overflowing_model(1, 0)
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every token alike: the first id is said
    prefix = read_prefix(model, [5] * 13)
    options = {"tokenizer": TOKENIZER, "batch_size": 2, "segment_length": 8, "prefix": prefix}
    with pytest.raises(CheckpointError, match=r"layer 1.*position 17"):
        list(stream_continuations(model, [[5] * 4], Sampling(max_tokens=3), **options))


def test_nothing_to_read_is_refused():
    with pytest.raises(DataError, match="prompt"):
        read_prefix(tiny_model(), [])
    with pytest.raises(DataError, match=r"999.*257"):
        read_prefix(tiny_model(), [999])


def test_tokens_that_others_choose_are_taken():
    model = tiny_model().eval()
    options = {"tokenizer": TOKENIZER, "batch_size": 2, "segment_length": 8}

    def agree(tokens):
        return torch.full_like(tokens, ord("x"))

    progress = stream_continuations(model, [[1], [2]], Sampling(max_tokens=3), agree=agree, **options)
    assert [end.tokens for end in progress if end.finish_reason] == [(120, 120, 120)] * 2


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
    """Continues a context of one token with a fixed text."""

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
