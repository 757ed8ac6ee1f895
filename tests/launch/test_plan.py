"""`statex plan` with the settings of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.cli import main
from tests.checkpoints_tools.builders import MAMBA2, write_model
from tests.runs import GLA, expanded, save_model, write_run

SHARED = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}


def test_a_runs_settings_come_from_its_file_and_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = save_model(expanded(GLA), tmp_path / "model")
    sections = {"model": {"path": str(model)}, "data": {"path": "shards"}, "parallel": {"context": 2}}
    file = write_run(tmp_path / "run.yaml", **sections, train={"num_steps": 1, "save_async": True})
    options = ["plan", "--config", str(file), "--world-size", "4", "--device", "cpu", "--json"]
    assert main([*options, "--segment-tokens", "32"]) == 0
    planned = json.loads(capsys.readouterr().out)
    training, memory = planned["training"], planned["after"]["memory"]
    assert (training["context"], training["accumulation"], training["segment_tokens"]) == (2, 2, 32)
    assert planned["left_out"] == {}
    assert memory["parts"] == planned["before"]["memory"]["parts"], "expanded already: taken as it is"
    assert memory["parts"]["copy to save"]["host"] > 0
    assert memory["passing"]["activations"]["host"] > 0
    assert main(options) == 0
    assert json.loads(capsys.readouterr().out)["after"]["memory"]["peak"]["host"] > memory["peak"]["host"]


def test_what_passed_states_take_is_said_to_be_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = expanded(GLA)
    sections = {"model": {"path": str(save_model(config, tmp_path / "model"))}, "data": {"path": "shards"}}
    file = write_run(tmp_path / "run.yaml", **sections, train={"num_steps": 1, "state_passing": 0.5})
    assert main(["plan", "--config", str(file), "--json"]) == 0
    left_out = json.loads(capsys.readouterr().out)["left_out"]["passed_states"]
    assert left_out["bytes_per_sequence"] == 8 * config.state_elements
    assert f"2 x 4 bytes x {config.state_elements:,} state elements" in left_out["says"]
    assert main(["plan", "--config", str(file)]) == 0
    assert left_out["says"] in capsys.readouterr().out


def test_features_are_shown_by_every_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    source = tmp_path / "in"
    write_model(source, {**MAMBA2, "num_hidden_layers": 1})
    options = ["--op", "grow_features", "--rolls", "1,2,0", "--relu", "--match-norm"]
    shown = "grow_features x4 lossless (rolls 1-2,0 relu match_norm)"
    assert main(["plan", str(source), *options]) == 0
    assert shown in capsys.readouterr().out
    assert main(["plan", str(source), *options, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["plan"]["layers"][0]["features"] == {"rolls": [1, 2, 0], "relu": True, "match_norm": True}
    assert planned["after"]["parameters"] - planned["before"]["parameters"] == 18
    assert main(["expand", "--source", str(source), "--target", str(tmp_path / "out"), *options]) == 0
    assert shown in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert shown in capsys.readouterr().out
    assert main(["verify", str(source), str(tmp_path / "out"), "--as-expansion"]) == 0
    assert main(["expand", "--source", str(tmp_path / "out"), "--target", str(tmp_path / "more"), *options]) == 2


def test_the_limit_of_kernels_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    values = {**SHARED, "model_type": "gated_deltanet", "num_heads": 2, "head_dim": 64}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert main(["plan", str(tmp_path), "--op", "grow_features", "--factor", "5"]) == 0
    assert f"{5 * 64} key channels" in capsys.readouterr().out


def test_a_plan_needs_a_model(capsys: pytest.CaptureFixture[str]):
    assert main(["plan"]) != 0
    assert "give MODEL_DIR, or --config" in capsys.readouterr().err
