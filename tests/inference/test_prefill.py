import random

import pytest
import torch

from statex_dist.data.tokenizer import BytesTokenizer
from statex_dist.errors import CheckpointError
from statex_dist.evaluation.scoring import decode_greedily
from statex_dist.inference import prefill as prefill_module
from statex_dist.inference.prefill import evaluating, prefill, read_contexts, rows_that_fit
from statex_dist.inference.vocabulary import doubt_tokenizer
from tests.evaluation.stand_ins import overflowing_model, tiny_model
from tests.raising import raises


def ids(length=40, rows=3, *, seed=0):
    return torch.randint(8, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", ["gla", "mamba2"])
def test_prefill_is_the_last_logits_and_state_of_the_whole_and_never_holds_the_others(family):
    model = tiny_model(family).double()
    computed = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: computed.append(output.shape[1]))
    with evaluating(model):
        logits, states = prefill(model, ids(), segment_length=11)
        assert computed == [1] * 4
        whole = model(ids(), output_states=True)
        halves = prefill(model, ids()[:, 25:], segment_length=4, states=prefill(model, ids()[:, :25])[1])
    assert torch.allclose(logits, whole.logits[:, -1], atol=1e-12)
    assert torch.allclose(halves[0], logits, atol=1e-12)
    for ours, theirs in zip(states, whole.states, strict=True):
        assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("place", [(0, 0), (2, 13), (1, 39)])
def test_the_layer_and_the_position_of_nan_are_named(layer, place):
    prompts = ids()
    prompts[place] = 7
    with (
        evaluating(model := overflowing_model(layer, 7)),
        raises(CheckpointError, "NaN", f"layer {layer}", f"position {place[1]}"),
    ):
        prefill(model, prompts, segment_length=10)


def test_nan_outside_the_layers_is_named_too():
    prompts = ids()
    prompts[1, 21] = 7
    model = tiny_model()
    with torch.no_grad():
        model.trunk.embedding_table.weight[7] = torch.nan
    with evaluating(model), pytest.raises(CheckpointError, match=r"embeddings.*position 21"):
        prefill(model, prompts, segment_length=10)
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[3] = torch.inf
    with evaluating(model), pytest.raises(CheckpointError, match=r"head.*position 0"):
        prefill(model, prompts, segment_length=10)
    with evaluating(model := tiny_model()):
        _, states = prefill(model, prompts)
        states[1] = tuple(tensor * torch.nan for tensor in states[1])
        with pytest.raises(CheckpointError, match=r"layer 1.*position 39"):
            prefill(model, prompts[:, :5], states=states, position=40)


def test_nan_while_an_answer_is_said_has_its_position():
    prompt = ids(rows=1)
    for seed in range(50):
        with evaluating(model := tiny_model(seed=seed)):
            said = decode_greedily(model, prompt, 4)[0].tolist()
        if said[2] not in (*prompt[0].tolist(), *said[:2]):
            break
    else:
        raise AssertionError("no model says a new token at last")
    with (
        evaluating(model := overflowing_model(1, said[2], seed=seed)),
        pytest.raises(CheckpointError, match=r"layer 1.*position 42"),
    ):
        decode_greedily(model, prompt, 4)


def test_decoding_ends_when_every_row_has_enough():
    model, asked = tiny_model(), []

    def stop(row, produced):
        asked.append((row, len(produced)))
        return len(produced) == (2, 4, 1)[row]

    with evaluating(model):
        whole = decode_greedily(model, ids(), 9)
        cut = decode_greedily(model, ids(), 9, stop=stop)
        assert decode_greedily(model, ids(), 3, stop=lambda row, produced: False).shape == (3, 3)
    assert torch.equal(cut, whole[:, :4])
    assert asked == [(0, 1), (1, 1), (2, 1), (0, 2), (1, 2), (1, 3), (1, 4)]


def test_a_tokenizer_that_uses_little_of_the_embedding_is_doubted(caplog):
    doubt_tokenizer(tiny_model(vocab_size=512), BytesTokenizer())
    assert not caplog.records
    doubt_tokenizer(tiny_model(vocab_size=1000), BytesTokenizer())
    assert "'bytes' has 258 ids" in caplog.text
    assert "embedding 1000" in caplog.text


def test_logits_to_keep_are_the_last():
    model = tiny_model()
    with evaluating(model):
        assert torch.allclose(model(ids(), logits_to_keep=5).logits, model(ids()).logits[:, -5:], atol=1e-6)


def test_logits_that_are_held_at_once_are_bounded(monkeypatch):
    monkeypatch.setattr(prefill_module, "MAX_LOGITS", 1000 * 258)
    model = tiny_model()
    assert [rows_that_fit(model, 10, wanted) for wanted in (1, 99, 100, 101)] == [1, 99, 100, 100]
    assert rows_that_fit(model, 5000, 7) == 1


def test_a_position_is_that_of_the_text_in_a_batch_of_unequal_rows():
    contexts = [[1] * 5, [2] * 30, [3] * 12]
    contexts[1][23] = 7
    with (
        evaluating(model := overflowing_model(1, 7)),
        pytest.raises(CheckpointError, match=r"layer 1.*position 123"),
    ):
        read_contexts(model, contexts, segment_length=4, position=100)


def test_each_row_keeps_the_state_of_its_own_last_token():
    model, rng = tiny_model().double().eval(), random.Random(1)
    contexts = [[rng.randrange(256) for _ in range(n)] for n in (5, 19, 1, 19, 8)]
    with torch.inference_mode():
        logits, states = read_contexts(model, contexts, segment_length=6)
        for row, context in enumerate(contexts):
            alone = model(torch.tensor([context]), output_states=True)
            torch.testing.assert_close(logits[row], alone.logits[0, -1])
            for state, wanted in zip(states, alone.states, strict=True):
                for tensor, expected in zip(state, wanted, strict=True):
                    torch.testing.assert_close(tensor[row], expected[0])
