"""Every command gives the same verdict on a directory, and loads the same weights: the tools and the model loader."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

import pytest
import torch

from launch.cli import main
from launch.model_options import load_for_decoding
from statex_dist.checkpoint.layout import complete_tags
from statex_dist.config import parse_config
from statex_dist.data.config import DataConfig
from statex_dist.engine.config import EngineConfig
from statex_dist.errors import StateXError
from statex_dist.models.hf import from_pretrained
from statex_dist.models.tensor_parallel.model import load_tensor_parallel
from statex_dist.models.tensor_parallel.share import TensorShare
from statex_dist.run import train
from statex_dist.run_config import ModelSource, RunConfig
from statex_dist.run_parts import build_model
from statex_dist.train.config import TrainConfig
from tests.checkpoint.directories import (
    BAD,
    GOOD,
    beside_zero,
    saved,
    spoilt,
    start,
    state_dict,
    weights_of,
    with_manifest,
)
from tests.runs import make_shards, write_run

COMMANDS = {
    "plan": lambda d, out: ["plan", d, "--factor", "2"],
    "expand": lambda d, out: ["expand", "--source", d, "--target", out, "--factor", "2"],
    "reshard": lambda d, out: ["reshard", "--source", d, "--target", out],
    "verify": lambda d, out: ["verify", d],
    "inspect": lambda d, out: ["inspect", d, "--json"],
    "generate": lambda d, out: ["generate", "--model", d, "--prompt", "a", "--max-new-tokens", "2"],
    "eval": lambda d, out: ["eval", "mqar", "--model", d, "--out", out, "--num-samples", "1", "--num-pairs", "2"],
}
LOADERS = {
    "serve": lambda d: load_for_decoding(
        argparse.Namespace(
            **{"model": str(d), "tokenizer": None, "mitigation": None, "segment_length": 8, "device": "cpu"},
            **{"dtype": "auto", "threads": 1, "no_digests": False},
        )
    )[0],
    "training": lambda d: build_model(run_config(d)),
    "--tp": lambda d: load_tensor_parallel(d, TensorShare()),
}


def run_config(directory: Path, **options) -> RunConfig:
    return RunConfig(
        run_dir="run",
        model=ModelSource(path=str(directory), **options),
        data=DataConfig(path="shards"),
        train=TrainConfig(num_steps=1),
        engine=EngineConfig(name="plain", precision="fp32"),
    )


def run(name: str, directory: Path, out: Path, capsys) -> tuple[int, str]:
    code = main([str(word) for word in COMMANDS[name](directory, out / name)])
    return code, "".join(capsys.readouterr())


@pytest.mark.parametrize("name", GOOD)
def test_a_good_directory_is_read_by_every_command(tmp_path, capsys, name):
    directory = tmp_path / "model"
    GOOD[name](directory)
    for command in COMMANDS:
        code, said = run(command, directory, tmp_path / "out", capsys)
        assert code == 0, (command, said)
    expected = state_dict()
    for command, load in LOADERS.items():
        found = load(directory).state_dict()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items()), command
    written = weights_of(tmp_path / "out" / "reshard")
    assert all(torch.equal(written[key], tensor) for key, tensor in expected.items())


@pytest.mark.parametrize("name", BAD)
def test_a_bad_directory_is_refused_by_every_command_in_the_same_words(tmp_path, capsys, name):
    make, words = BAD[name]
    directory = tmp_path / "model"
    make(directory)
    for command in COMMANDS:
        code, said = run(command, directory, tmp_path / "out", capsys)
        # inspect reports the problem in its result.
        assert code in ((1, 2) if command == "inspect" else (2,)), (command, said)
        assert words in said, (command, said)
        assert command == "inspect" or len(said.strip().splitlines()[-1]) <= 400 + len(str(directory)), said
    for command, load in LOADERS.items():
        with pytest.raises(StateXError) as caught:
            load(directory)
        assert words in str(caught.value), command
        assert "\n" not in str(caught.value)


READING = [name for name in COMMANDS if name not in ("plan", "inspect")]


@pytest.mark.parametrize("command", [*READING, *LOADERS])
def test_damaged_weights_beside_a_manifest_are_refused(tmp_path, capsys, command):
    directory = with_manifest(tmp_path / "model")
    spoilt(directory)
    if command in COMMANDS:
        code, said = run(command, directory, tmp_path / "out", capsys)
        assert code == (1 if command == "verify" else 2)
    else:
        with pytest.raises(StateXError) as caught:
            LOADERS[command](directory)
        said = str(caught.value)
    assert "values of tensor" in said


@pytest.mark.parametrize("command", [*COMMANDS, *LOADERS])
def test_a_file_of_another_size_than_the_manifest_says_is_always_refused(tmp_path, capsys, command):
    directory = with_manifest(tmp_path / "model")
    manifest = json.loads((directory / "MANIFEST.json").read_text())
    manifest["files"]["model.safetensors"]["size"] += 1
    (directory / "MANIFEST.json").write_text(json.dumps(manifest))
    if command in COMMANDS:
        words = [*COMMANDS[command](directory, tmp_path / "out")]
        words += ["--no-digests"] if command in ("generate", "eval") else []
        assert main([str(word) for word in words]) in (1, 2)
        assert "MANIFEST.json says" in "".join(capsys.readouterr())
    else:
        with pytest.raises(StateXError, match=r"MANIFEST.json says"):
            LOADERS[command](directory)


def test_digests_can_be_switched_off_and_the_log_says_so(tmp_path, capsys, caplog, monkeypatch):
    directory = with_manifest(tmp_path / "model")
    spoilt(directory)
    words = COMMANDS["generate"](directory, tmp_path)
    assert main([str(word) for word in [*words, "--no-digests"]]) == 0
    assert "(switched off)" in capsys.readouterr().err
    monkeypatch.setattr(logging.getLogger("statex_dist"), "propagate", True)
    build_model(run_config(directory, check_digests=False))
    assert "not compared with digests" in caplog.text


def test_a_training_checkpoint_keeps_its_masters_beside_gathered_weights(tmp_path, capsys):
    directory = tmp_path / "model"
    beside_zero(directory)
    words = ["reshard", "--source", str(directory), "--target", str(tmp_path / "out"), "--to", "zero3", "--json"]
    assert main([*words, "--world-size", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "zero3"


def inspected(directory: Path, capsys) -> tuple[int, dict]:
    code = main(["inspect", str(directory), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_inspect_says_what_can_be_done_with_a_model(tmp_path, capsys):
    everything = dict.fromkeys(("plan", "expand", "train", "run"), True)
    code, facts = inspected(saved(tmp_path / "good"), capsys)
    assert (code, facts["able"], facts["unable"]) == (0, everything, {})
    assert any("no checksum" in line for line in facts["unchecked"])
    assert any("names, shapes and dtypes" in line for line in facts["checks"])
    code, facts = inspected(with_manifest(tmp_path / "manifest"), capsys)
    assert any("sizes of" in line for line in facts["checks"])
    assert any("compares digests" in line for line in facts["unchecked"])
    other = tmp_path / "llama"
    start(other, model_type="llama", architectures=["LlamaForCausalLM"])
    saved_other = {"model.embed_tokens.weight": torch.zeros(4, 4)}
    saved(other, saved_other, model_type="llama")
    code, facts = inspected(other, capsys)
    assert code == 0
    assert facts["able"] == dict.fromkeys(everything, False)
    assert facts["unable"]["expand"] == "not supported: expand cannot read model_type 'llama'"
    BAD["one tensor less"][0](tmp_path / "less")
    code, facts = inspected(tmp_path / "less", capsys)
    assert code == 1
    assert not any(facts["able"].values())
    assert "lacks tensor 'lm_head.weight'" in facts["unable"]["run"]


def test_what_is_stripped_or_not_used_is_said(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("statex_dist"), "propagate", True)
    caplog.set_level(logging.INFO, logger="statex_dist")
    for name, words in (
        ("DDP's prefix", "begins with 'module.', which is taken off"),
        ("extra buffers", "follow from the configuration or are empty"),
        ("nested bin", "are left out: ['epoch', 'scheduler']"),
    ):
        GOOD[name](tmp_path / name)
        from_pretrained(tmp_path / name)
        assert words in caplog.text


@pytest.fixture(scope="module")
def training_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two saved steps, by the plain engine, of a model that was given as a ``.bin`` directory."""
    root = tmp_path_factory.mktemp("run")
    GOOD["bin"](root / "model")
    shards = make_shards(root / "data")
    file = write_run(
        root / "run.yaml", data={"path": str(shards)}, engine={"name": "plain"}, model={"path": str(root / "model")}
    )
    assert train(parse_config(RunConfig, ["--config", str(file)], prog="train.py"))
    return root / "run"


@pytest.mark.parametrize("place", ["", "checkpoints", "tag"])
def test_a_training_run_is_read_by_every_command(training_run, tmp_path, capsys, place):
    checkpoints = training_run / "checkpoints"
    tag = complete_tags(checkpoints)[0]
    directory = checkpoints / tag if place == "tag" else training_run / place
    for command in COMMANDS:
        code, said = run(command, directory, tmp_path / "out", capsys)
        assert code == 0, (command, said)
    expected = torch.load(checkpoints / tag / "plain_state.pt", weights_only=True)["module"]
    for command, load in LOADERS.items():
        found = load(directory).state_dict()
        assert all(torch.equal(found[key], tensor.to(found[key].dtype)) for key, tensor in expected.items()), command
