"""State health of hybrids: recurrent states alone, against the caches of transformers and the recurrence in float64."""

import json

import numpy as np
import pytest
import torch

from launch.cli import main
from statex_dist.data.tokenizer import BytesTokenizer
from statex_dist.evaluation.health.collapse import CollapseSettings, collapse_units, series
from statex_dist.evaluation.health.collapse import _draw as draw
from statex_dist.evaluation.health.verdict import judge_heads
from statex_dist.evaluation.journal import work
from statex_dist.inference.prefill import evaluating
from statex_dist.inference.rows import take_rows
from statex_dist.models.hf import from_pretrained
from statex_dist.ops.attention import KeyValues
from tests.models.hybrid.hosts import save_host

TOKENIZER = BytesTokenizer()
HOSTS = ("nemotron_h", "falcon_h1", "qwen3_next", "zamba2", "kimi_linear")
CHOSEN = CollapseSettings(
    train_length=16, length=48, segment_length=10, points=8, sequences=2, prompts=("text",), batch_size=2
)


@pytest.fixture(scope="module", params=HOSTS)
def measured(request, tmp_path_factory):
    """A host, our model of it, its directory, and the records of a run of ``collapse``."""
    directory = tmp_path_factory.mktemp(request.param)
    host = save_host(request.param, directory, vocab_size=258)
    TOKENIZER.save(directory)
    model = from_pretrained(directory).eval()
    return host, model, directory, work(collapse_units(model, CHOSEN, TOKENIZER))


def text_of(sequence):
    return torch.as_tensor(draw("text", sequence, CHOSEN, TOKENIZER)).long()[None]


def test_norms_are_those_of_the_recurrent_states_in_the_hosts_cache(measured):
    host, model, _, records = measured
    for record in records:
        with torch.no_grad():
            cache = host(text_of(record["sequence"])[:, : CHOSEN.tokens], use_cache=True).past_key_values
        assert record["layers"] == list(model.config.recurrent_layers)
        for layer, head, values in series(record, "norm"):
            state = cache.layers[layer].recurrent_states
            state = state[0] if isinstance(state, dict) else state
            np.testing.assert_allclose(values[-1], float(state[0, head].norm()), rtol=1e-4)
    assert {verdict.layer for verdict in judge_heads(records, CHOSEN)} == set(model.config.recurrent_layers)


def emptied(states):
    """States before a text, of the same shapes but for keys and values."""
    return [
        KeyValues(state.keys[:, :, :0], state.values[:, :, :0], torch.zeros_like(state.lengths))
        if isinstance(state, KeyValues)
        else tuple(map(torch.zeros_like, state))
        for state in states
    ]


def test_retention_is_what_a_state_leaves_of_itself(measured):
    """A layer's input does not depend on its own state: so the difference of two runs is the share that is left."""
    _, model, _, records = measured
    ids = text_of(0)[:, : CHOSEN.train_length]
    with evaluating(model):
        after = model(ids, output_states=True).states
        for at, layer in enumerate(model.config.recurrent_layers):
            place, start = model.state_places.index((layer, "recurrent")), emptied(take_rows(after, [0]))
            signs = torch.randint(0, 2, start[place][0].shape, generator=torch.Generator().manual_seed(at)) * 2 - 1
            start[place] = (signs.float() * 1e6, *start[place][1:])
            left = (model(ids, states=start, output_states=True).states[place][0] - after[place][0]) / 1e6
            wanted = left.double().square().mean((-2, -1)).sqrt()[0]
            np.testing.assert_allclose(records[0]["retention"][at], wanted, rtol=1e-3, atol=1e-7)


def test_the_command_line_judges_recurrent_layers(measured, tmp_path, capsys):
    _, model, directory, _ = measured
    options = ["--train-length", "16", "--length", "48", "--sequences", "1", "--prompts", "text", "--threads", "1"]
    command = ["eval", "collapse", "--model", str(directory), "--out", str(tmp_path), *options, "--json"]
    assert main(command) in (0, 1)
    found = json.loads(capsys.readouterr().out)
    assert {head["layer"] for head in found["prompts"]["text"]["worst_heads"]} <= set(model.config.recurrent_layers)
    assert found["model"]["state_numbers"] == model.config.state_elements
