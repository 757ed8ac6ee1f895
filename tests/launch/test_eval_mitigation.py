"""``statex eval SUITE --mitigation``: the model is measured under it, the results say so, bad values are one line."""

from __future__ import annotations

import json

import pytest
import torch
from jsonargparse import ArgumentParser

from launch.cmd_eval import add_arguments, run
from statex_dist.data.tokenizer import BytesTokenizer
from statex_dist.errors import ConfigError
from statex_dist.models.hf import from_pretrained, save_pretrained
from statex_dist.models.mitigation import SlidingWindow
from tests.models.tiny import build, gla_config, kda_config


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name, config in (("gla", gla_config(vocab_size=260)), ("kda", kda_config(vocab_size=260))):
        save_pretrained(build(config, dtype=torch.float32), root / name)
        BytesTokenizer().save(root / name)
    (root / "text.txt").write_text("some words of a text " * 20)
    return root


def evaluate(root, out, *arguments, model="gla"):
    parser = ArgumentParser()
    add_arguments(parser)
    common = ["perplexity", "--model", root / model, "--data", root / "text.txt", "--out", out]
    return run(parser.parse_args([str(argument) for argument in (*common, *arguments)]))


def test_loss_is_that_of_the_model_under_the_mitigation_and_the_results_name_it(models, tmp_path):
    assert evaluate(models, tmp_path, "--mitigation", "sliding-window:tokens=3") == 0
    summary = json.loads((tmp_path / "perplexity.json").read_text())
    assert summary["model"]["mitigation"] == "sliding-window:tokens=3"
    tokenizer = BytesTokenizer()
    ids = torch.tensor([[*tokenizer.encode((models / "text.txt").read_text()).tolist(), tokenizer.eos_token_id]])
    model = from_pretrained(models / "gla", dtype=torch.float32).eval()
    losses = []
    for model.mitigation in (None, SlidingWindow(tokens=3)):
        with torch.no_grad():
            losses.append(model(ids[:, :-1], labels=ids[:, 1:]).loss_sum.item() / (ids.shape[1] - 1))
    assert summary["loss"] == pytest.approx(losses[1], rel=1e-5)
    assert abs(losses[1] - losses[0]) > 1e-3


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (
            "gla",
            ["--mitigation", "window"],
            "mitigation 'window'.*forget-more, state-norm, sliding-window",
        ),
        ("gla", ["--mitigation", ""], "mitigation ''"),
        ("kda", ["--mitigation", "sliding-window:tokens=8"], "sliding-window.*kda"),
        (
            "gla",
            ["--mitigation", "state-norm:limit=1,every=64", "--segment-length", "100"],
            "100 tokens.*every=64",
        ),
    ],
)
def test_bad_mitigations_are_refused_before_anything_is_written(models, tmp_path, model, arguments, message):
    with pytest.raises(ConfigError, match=message):
        evaluate(models, tmp_path / "out", *arguments, model=model)
    assert not (tmp_path / "out").exists()
