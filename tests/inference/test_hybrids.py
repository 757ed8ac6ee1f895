"""Hybrids decode as transformers does: batches, long prompts in segments, stored prefixes, the server's batch."""

from __future__ import annotations

import pytest
import torch

from statex_dist.data.tokenizer import BytesTokenizer
from statex_dist.errors import CheckpointError
from statex_dist.evaluation.health.collapse import state_statistics
from statex_dist.evaluation.health.retention import RetentionProbe
from statex_dist.inference.cache import load_prefix, save_prefix
from statex_dist.inference.decoding import Row, Sampling
from statex_dist.inference.generate import read_prefix, stream_continuations
from statex_dist.inference.prefill import evaluating, explain_not_finite, join_rows, read_contexts, take_rows
from statex_dist.inference.serving.batch import ContinuousBatch, Prompt
from statex_dist.inference.serving.limits import Limits
from statex_dist.inference.serving.protocol import RequestError
from statex_dist.models.build import build_lm
from statex_dist.models.hf import from_pretrained
from statex_dist.models.registry import make_plan
from statex_dist.ops.attention import KeyValues
from tests.models.hybrid.hosts import save_host

TOKENIZER = BytesTokenizer()
HOSTS = ["nemotron_h", "falcon_h1", "zamba2", "qwen3_next", "kimi_linear", "minimax"]
LENGTHS = (11, 3, 1, 11, 7)
GREEDY = Sampling(max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module", params=HOSTS)
def pair(request, tmp_path_factory):
    """A host with a vocabulary of bytes, and our model of it."""
    directory = tmp_path_factory.mktemp(request.param)
    host = save_host(request.param, directory, vocab_size=258, eos_token_id=256, pad_token_id=257)
    return host, from_pretrained(directory).eval()


def contexts():
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, 256, (length,), generator=generator).tolist() for length in LENGTHS]


def written(model, contexts, **options):
    """Return the tokens that our model writes after each context."""
    found = stream_continuations(model, contexts, GREEDY, tokenizer=TOKENIZER, **options)
    ended = {progress.key: list(progress.tokens) for progress in found if progress.finish_reason}
    return [ended[key] for key in range(len(contexts))]


def of_the_host(host, context, count=GREEDY.max_tokens):
    """Return the tokens that transformers writes after a context."""
    ids = torch.tensor([context])
    settings = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return host.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, len(context) :].tolist()


@torch.no_grad()
def test_a_batch_of_unequal_prompts_writes_what_transformers_writes_of_each(pair):
    host, ours = pair
    found = written(ours, contexts(), batch_size=4, segment_length=4)
    assert found == [of_the_host(host, context) for context in contexts()]


def test_keys_and_values_are_as_long_as_the_longest_row_that_is_left(pair):
    _, ours = pair
    with evaluating(ours):
        _, states = read_contexts(ours, contexts(), segment_length=4)
    kept = take_rows(states, [4, 1])
    assert len(kept) == len(ours.state_places)
    for (_, kind), whole, state in zip(ours.state_places, states, kept, strict=True):
        assert isinstance(state, KeyValues) == (kind == "attention")
        if kind == "attention":
            assert whole.lengths.tolist() == list(LENGTHS)
            assert (state.keys.shape[2], state.lengths.tolist()) == (7, [7, 3])
            assert not state.keys[1, :, :4].any()
            again = join_rows([state], [whole])[0]
            assert again.keys.shape[2] == 11
            assert torch.equal(again.keys[0, :, 4:], state.keys[0])


def test_a_stored_prefix_goes_on_as_if_it_had_never_left_memory(pair, tmp_path):
    host, ours = pair
    context = contexts()[0]
    prefix = read_prefix(ours, context[:8], segment_length=3)
    save_prefix(tmp_path / "states", prefix, ours, TOKENIZER)
    loaded = load_prefix(tmp_path / "states", ours, TOKENIZER)
    found = written(ours, [context[8:], []], batch_size=2, segment_length=4, prefix=loaded)
    assert found == [of_the_host(host, context), of_the_host(host, context[:8])]


def test_a_prefix_of_another_rotation_is_refused(tmp_path):
    for name, theta in (("a", 10_000.0), ("b", 20_000.0)):
        rope = {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}
        save_host("qwen3_next", tmp_path / name, vocab_size=258, **rope)
    ours, other = (from_pretrained(tmp_path / name).eval() for name in "ab")
    save_prefix(tmp_path / "states", read_prefix(ours, [1, 2, 3]), ours, TOKENIZER)
    with pytest.raises(CheckpointError, match="host"):
        load_prefix(tmp_path / "states", other, TOKENIZER)


def test_the_servers_batch_holds_no_more_keys_and_values_than_allowed(pair):
    _, ours = pair
    batch = ContinuousBatch(ours, TOKENIZER, max_rows=4, segment_length=4, max_kv_tokens=40)
    prompts = [
        Prompt(tokens=context, rows=[Row(key=i, sampling=GREEDY, position=len(context))])
        for i, context in enumerate(contexts())
    ]
    waiting, ended = list(prompts), {}
    with evaluating(ours):
        while waiting or batch.running or batch.reading:
            while waiting and batch.takes(waiting[0]):
                batch.admit(waiting.pop(0))
            assert batch.running + batch.reading <= 3, "11 + 3 + 1 tokens and 6 of each completion are 33 of 40"
            for done in batch.step().progress:
                if done.finish_reason:
                    ended[done.key] = list(done.tokens)
    assert [ended[i] for i in range(5)] == written(ours, contexts(), batch_size=1, segment_length=64)
    with pytest.raises(RequestError, match="40"):
        Limits(max_kv_tokens=40).check_kv([contexts()[0]], 2, 12)


def test_messages_name_the_layer_of_a_state(pair):
    _, ours = pair
    with evaluating(ours):
        _, states = read_contexts(ours, [contexts()[0]], segment_length=16)
        place = max(i for i, (_, kind) in enumerate(ours.state_places) if kind == "attention")
        states[place].keys[0, 0, -1] = torch.nan
        error = explain_not_finite(ours, torch.tensor([[1, 2]]), states, position=11)
    assert f"keys and values of layer {ours.state_places[place][0]} at position 10" in str(error)


def test_retention_and_statistics_are_those_of_recurrent_layers(pair):
    """The probe is compared with two runs of the model from states that differ by it."""
    _, ours = pair
    ids = torch.tensor([contexts()[0]])
    with evaluating(ours):
        start = ours(ids[:, :4], output_states=True).states
        probe = RetentionProbe(ours)
        with probe:
            after = ours(ids[:, 4:], states=start, output_states=True).states
    kept = probe.retention()
    recurrent = {layer for layer, kind in ours.state_places if kind == "recurrent"}
    assert {layer for layer, (whole, _) in enumerate(kept) if whole.shape[1]} == recurrent
    layer = min(recurrent)
    place = ours.state_places.index((layer, "recurrent"))
    signs = torch.randint(0, 2, start[place][0].shape[1:], generator=torch.Generator().manual_seed(layer)) * 2 - 1
    moved = list(start)
    moved[place] = (start[place][0] + 1e6 * signs, *start[place][1:])
    with evaluating(ours):
        # Only the first recurrent layer's own state is compared: later layers see other inputs.
        there = ours(ids[:, 4:], states=moved, output_states=True).states[place][0]
    ratio = (there - after[place][0]).square().sum((-2, -1)).sqrt() / (1e6 * signs.numel() ** 0.5 / len(signs) ** 0.5)
    torch.testing.assert_close(torch.as_tensor(kept[layer][0]), ratio.double(), rtol=1e-3, atol=1e-6)
    assert state_statistics(after[place][0])["mean"].shape == (1, after[place][0].shape[1])


def test_a_grown_model_decodes(tmp_path):
    save_host("nemotron_h", tmp_path, vocab_size=258)
    ours = from_pretrained(tmp_path).eval()
    grown = build_lm(make_plan(ours.config, layers="all", factor=2, init="inherit")).eval()
    for parameter in grown.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    together = written(grown, contexts(), batch_size=3, segment_length=4)
    assert together == written(grown, contexts(), batch_size=1, segment_length=4)
