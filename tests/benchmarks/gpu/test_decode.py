"""Decoding: the benchmark's steps are the model's, and it counts the bytes that a step moves."""

import itertools
import json

import pytest
import torch

from benchmarks.gpu import decode
from benchmarks.gpu.shapes import TINY_MODELS, expanded_config, random_model
from benchmarks.measure import Ceilings

CPU = torch.device("cpu")


def tiny(name="GLA tiny", expansion="mixed"):
    return random_model(expanded_config(TINY_MODELS[name], expansion), CPU, torch.float32).eval()


@torch.inference_mode()
def test_steps_continue_the_prompt(monkeypatch):
    """Greedy steps give the tokens that running the whole sequence gives."""
    model = tiny()
    prompt = torch.randint(256, (1, decode.PROMPT))
    monkeypatch.setattr(torch, "randint", lambda *_, **__: prompt)
    states = decode.states_of_prompt(model, 3, CPU)
    first = torch.tensor([[5], [6], [7]])
    last = decode.decode(model, first, states, steps=3)
    for row in range(3):
        ids = torch.cat([prompt, first[row : row + 1]], dim=1)
        for _ in range(3):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        assert last[row, 0] == ids[0, -1]


@pytest.mark.parametrize("name", list(TINY_MODELS))
def test_bytes_of_states_are_those_of_the_geometry(name):
    model = tiny(name, expansion="merged" if "GLA" in name else "d_state x 4")
    row = decode.measure(model, 2, CPU, Ceilings(product_flops=1e12, copy_bytes=1e9), budget=0.001)
    config = model.config
    one = sum(config.layer_geometry(layer).state_bytes for layer in range(config.num_hidden_layers))
    assert row["sequence_bytes"] == one
    assert row["state_bytes_moved"] == 2 * 2 * one
    assert row["tokens_per_s"] == pytest.approx(2 / row["step_s"])
    assert row["copy_share"] == pytest.approx((row["weight_bytes"] + 4 * one) / row["step_s"] / 1e9)
    weights = 4 * sum(p.numel() for p in model.parameters())
    table = 4 * config.vocab_size * config.hidden_size
    assert row["weight_bytes"] == (weights if config.tie_word_embeddings else weights - table)


def test_the_command_runs_on_a_cpu(tmp_path, capsys):
    out = tmp_path / "decode.json"
    options = ["--device", "cpu", "--tiny", "--only", "GLA tiny", "--batches", "1", "3", "--budget", "0.01"]
    assert decode.main([*options, "--out", str(out)]) == 0
    document = json.loads(out.read_text())
    expansions = ("as it was", "merged", "mixed", "keys x 4", "features x 4")
    rows = [(row["expansion"], row["batch"]) for row in document["rows"]]
    assert rows == list(itertools.product(expansions, (1, 3)))
    assert not [row for row in document["rows"] if "failed" in row]
    assert capsys.readouterr().out.strip() == decode.render(document)


def test_a_batch_that_does_not_fit_is_a_row_and_not_the_end(monkeypatch, capsys):
    measure = decode.measure

    def limited(model, batch, *rest):
        if batch > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.\nmore")
        return measure(model, batch, *rest)

    monkeypatch.setattr(decode, "measure", limited)
    monkeypatch.setattr(Ceilings, "measure", lambda _: Ceilings(product_flops=1e12, copy_bytes=1e9))
    options = ["--device", "cpu", "--tiny", "--only", "Mamba2 tiny", "--batches", "2", "1", "--budget", "0.01"]
    assert decode.main(options) == 0
    table = [line for line in capsys.readouterr().out.splitlines() if "tiny" in line]
    assert len(table) == 2 * 2
    assert sum("OutOfMemoryError: CUDA out of memory." in line for line in table) == 2
