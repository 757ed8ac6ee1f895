"""Hybrids decode as transformers' own ``generate`` does, with keys and values of rows of unequal lengths."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from launch.cli import main
from statex_dist.data.tokenizer import BytesTokenizer
from statex_dist.errors import CheckpointError, ConfigError
from statex_dist.inference import memory
from statex_dist.inference.cache import load_prefix, save_prefix
from statex_dist.inference.decoding import DecodingLoop, Row, Sampling
from statex_dist.inference.generate import read_prefix, stream_continuations
from statex_dist.inference.memory import measure_row
from statex_dist.inference.prefill import evaluating, explain_not_finite, explain_step, read_contexts
from statex_dist.inference.rows import join_rows, key_value_bytes, state_bytes, take_rows
from statex_dist.inference.serving.batch import ContinuousBatch, Prompt
from statex_dist.inference.text import continuation_text
from statex_dist.models.hf import from_pretrained
from statex_dist.models.tensor_parallel.share import TensorShare
from statex_dist.ops.attention import KeyValues
from tests.inference.serving.running import serving
from tests.models.hybrid.hosts import HOSTS, save_host

TOKENIZER = BytesTokenizer()
TOKENS = 6
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [2, 7], [1, 8, 2, 8, 1, 8]]
GREEDY = Sampling(max_tokens=TOKENS, ignore_eos=True)


FEW = ("nemotron_h", "falcon_h1", "zamba2", "qwen3_next", "kimi_linear")
"""Hosts of the default tests: each kind of mixer, both kinds in a layer, shared blocks, values of another size."""


@pytest.fixture(
    scope="module",
    params=[host if host in FEW else pytest.param(host, marks=pytest.mark.slow) for host in HOSTS],
)
def pair(request, tmp_path_factory):
    """A host with the vocabulary of bytes, and our model of its directory."""
    directory = tmp_path_factory.mktemp(request.param)
    host = save_host(request.param, directory, vocab_size=258)
    TOKENIZER.save(directory)
    return host, from_pretrained(directory).eval(), directory


@pytest.fixture(scope="module")
def wanted(pair):
    """The tokens of transformers' ``generate`` for each prompt alone."""
    return [by_host(pair[0], prompt) for prompt in PROMPTS]


def by_host(host, prompt, count=TOKENS):
    found = host.generate(
        torch.tensor([prompt]),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    return found[0, len(prompt) :].tolist()


def continued(model, contexts, sampling=GREEDY, **options):
    values = {"tokenizer": TOKENIZER, "batch_size": 4, "segment_length": 4, **options}
    found = {}
    for progress in stream_continuations(model, contexts, sampling, **values):
        if progress.finish_reason is not None:
            found[progress.key] = list(progress.tokens)
    return [found[key] for key in sorted(found)]


def test_batches_of_unequal_prompts_decode_as_the_host_does(pair, wanted):
    assert continued(pair[1], PROMPTS) == wanted


def test_rows_are_drawn_as_they_would_be_alone(pair):
    sampling = Sampling(max_tokens=TOKENS, ignore_eos=True, temperature=1.5, top_k=50)
    alone = [continued(pair[1], [prompt], sampling, seeds=[7 + i])[0] for i, prompt in enumerate(PROMPTS)]
    assert continued(pair[1], PROMPTS, sampling, seeds=[7, 8, 9]) == alone


def test_reordered_and_repeated_rows_keep_their_texts(pair):
    """As a beam search orders them."""
    model = pair[1]
    with evaluating(model):
        _, states = read_contexts(model, PROMPTS, segment_length=4)
        order = [2, 0, 2, 1]
        column = torch.tensor([[9], [8], [7], [6]])
        output = model(column, states=take_rows(states, order), output_states=True)
        for row, place in enumerate(order):
            whole = torch.tensor([[*PROMPTS[place], int(column[row])]])
            torch.testing.assert_close(output.logits[row, -1], model(whole).logits[0, -1], rtol=0, atol=1e-5)


def test_memory_of_keys_and_values_leaves_with_the_longest_row(pair):
    model = pair[1]
    with evaluating(model):
        logits, states = read_contexts(model, PROMPTS, segment_length=4)
        loop = DecodingLoop(model, TOKENIZER)
        loop.add([Row(key=i, sampling=GREEDY) for i in range(len(PROMPTS))], logits, states)
        loop.drop({0})
        loop.step()
        _, one = read_contexts(model, [[*PROMPTS[2], 1]], segment_length=4)
        assert loop.state_bytes == 2 * state_bytes(one)
        loop.drop({2})
        loop.step()
        _, one = read_contexts(model, [[*PROMPTS[1], 1, 1]], segment_length=4)
        assert loop.state_bytes == state_bytes(one)


def test_a_kept_prefix_is_continued_exactly(pair, wanted, tmp_path):
    model = pair[1]
    first = read_prefix(model, PROMPTS[0][:7], segment_length=4)
    save_prefix(tmp_path / "states", first, model, TOKENIZER)
    loaded = load_prefix(tmp_path / "states", model, TOKENIZER)
    assert [type(state) for state in loaded.states] == [type(state) for state in first.states]
    for ours, theirs in zip(first.states, loaded.states, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    contexts = [PROMPTS[0][7:], [], [5]]
    found = continued(model, contexts, prefix=loaded)
    assert found == continued(model, contexts, prefix=first)
    assert found[0] == wanted[0]
    stored = load_file(tmp_path / "states")
    kept = sum(tensor.nbytes for name, tensor in stored.items() if name.startswith("layers."))
    assert kept == state_bytes(first.states)


def test_a_prefix_of_another_model_is_refused(pair, tmp_path):
    model = pair[1]
    save_prefix(tmp_path / "states", read_prefix(model, PROMPTS[0]), model, TOKENIZER)
    other = copy.deepcopy(model)
    last = sorted(other.stored_tensors().items())[-1][1]  # of some hosts a buffer is no parameter but decides too
    last.data += 1
    with pytest.raises(CheckpointError, match="weights differ"):
        load_prefix(tmp_path / "states", other, TOKENIZER)


def test_an_error_names_layer_and_kind_of_a_state(pair):
    model = pair[1]
    with evaluating(model):
        _, states = read_contexts(model, PROMPTS[:1], segment_length=16)
        for at, (layer, kind) in enumerate(model.state_places):
            bad = join_rows(states)
            bad[at][0].view(-1)[-1] = torch.nan
            name = f"keys and values of layer {layer} " if kind == "attention" else f"state of layer {layer} "
            assert name in str(explain_step(model, bad, 0, position=9))
            assert name in str(explain_not_finite(model, torch.tensor([[1]]), bad, position=11))
            assert isinstance(bad[at], KeyValues) == (kind == "attention")


def test_the_command_line_generates_what_the_host_does(pair, capsys):
    host, _, directory = pair
    prompts = ["The river rose", "a"]
    options = ["--max-new-tokens", str(TOKENS), "--ignore-eos", "--segment-length", "4", "--threads", "1", "--json"]
    texts = [part for prompt in prompts for part in ("--prompt", prompt)]
    assert main(["generate", "--model", str(directory), *texts, *options]) == 0
    found = [part["tokens"] for part in json.loads(capsys.readouterr().out)["continuations"]]
    assert found == [by_host(host, TOKENIZER.encode(prompt).tolist()) for prompt in prompts]


def served(model, batch, prompts):
    """Decode prompts as the server's worker admits them; return the tokens and the most rows at once."""
    produced, most, waiting = {}, 0, list(prompts)
    while waiting or batch.running or batch.reading:
        while waiting and batch.fits(waiting[0]):
            batch.admit(waiting.pop(0))
        for progress in batch.step().progress:
            assert progress.error is None
            if progress.finish_reason is not None:
                produced[progress.key] = list(progress.tokens)
        most = max(most, batch.running + batch.reading)
    assert batch.state_bytes == 0
    return [produced[key] for key in sorted(produced)], most


@pytest.mark.parametrize(("rows", "tokens", "most"), [(2, None, 2), (3, 23, 1), (3, 34, 2)])
def test_a_served_batch_takes_rows_as_slots_and_memory_allow(pair, wanted, rows, tokens, most):
    """At their ends the rows have 17, 8 and 12 tokens; a batch has the memory of its longest row for each."""
    prompts = [
        Prompt(tokens=prompt, rows=[Row(key=i, sampling=GREEDY, position=len(prompt))])
        for i, prompt in enumerate(PROMPTS)
    ]
    with evaluating(pair[1]):
        batch = ContinuousBatch(pair[1], TOKENIZER, max_rows=rows, segment_length=4, max_kv_tokens=tokens)
        assert served(pair[1], batch, prompts) == (wanted, most)


def test_a_batch_that_memory_is_too_small_for_is_cut_or_refused(pair, wanted, monkeypatch):
    model = pair[1]
    row = measure_row(model)
    states = read_prefix(model, PROMPTS[0]).states
    assert key_value_bytes(states) == row.per_token * len(PROMPTS[0])
    longest = len(PROMPTS[0]) + TOKENS
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2 * row.per_token * longest)
    assert continued(model, PROMPTS) == wanted
    assert memory.rows_with_memory(model, longest, 4) == 1
    with pytest.raises(ConfigError):
        continued(model, [[1] * (len(PROMPTS[0]) + 1)])


@pytest.mark.parametrize("model_type", ["nemotron_h", "falcon_h1"])
def test_the_server_refuses_what_cannot_fit_and_counts_keys_and_values(model_type, tmp_path):
    host = save_host(model_type, tmp_path, vocab_size=258)
    model = from_pretrained(tmp_path).eval()
    allowed = 40 * measure_row(model).per_token
    with serving(model, max_kv_bytes=allowed) as server:
        greedy = {"temperature": 0.0, "ignore_eos": True}
        refused = server.post(prompt=[1] * 31, max_tokens=10, **greedy)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
        assert server.post(prompt=[1] * 10, max_tokens=4, n=3, **greedy).status_code == 400
        text = server.post(prompt=PROMPTS[0], max_tokens=TOKENS, **greedy).json()["choices"][0]["text"]
        assert text == continuation_text(TOKENIZER, PROMPTS[0], by_host(host, PROMPTS[0]))
        assert server.metrics()["key_value_bytes"] == 0


def test_ranks_that_would_cut_attention_are_refused(pair):
    load_tensor_parallel = pytest.importorskip("statex_dist.models.tensor_parallel.model").load_tensor_parallel
    with pytest.raises(ConfigError, match="without --tp"):
        load_tensor_parallel(pair[2], TensorShare())


def test_a_prefix_read_with_another_rotation_is_refused(tmp_path):
    for name, theta in (("a", 10_000.0), ("b", 20_000.0)):
        rope = {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}
        save_host("qwen3_next", tmp_path / name, vocab_size=258, **rope)
    ours, other = (from_pretrained(tmp_path / name).eval() for name in "ab")
    save_prefix(tmp_path / "states", read_prefix(ours, [1, 2, 3]), ours, TOKENIZER)
    with pytest.raises(CheckpointError, match="rope_theta"):
        load_prefix(tmp_path / "states", other, TOKENIZER)


def test_a_prefix_whose_header_names_another_length_is_refused(pair, tmp_path):
    save_prefix(tmp_path / "states", read_prefix(pair[1], PROMPTS[0]), pair[1], TOKENIZER)
    with safe_open(tmp_path / "states", "pt") as file:
        header = file.metadata()
    save_file(load_file(tmp_path / "states"), tmp_path / "states", {**header, "num_tokens": "5"})
    with pytest.raises(CheckpointError, match="5 tokens"):
        load_prefix(tmp_path / "states", pair[1], TOKENIZER)
