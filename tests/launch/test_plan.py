"""`statex plan` with the settings of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.cli import main
from tests.runs import GLA, expanded, save_model, write_run


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


def test_a_plan_needs_a_model(capsys: pytest.CaptureFixture[str]):
    assert main(["plan"]) != 0
    assert "give MODEL_DIR, or --config" in capsys.readouterr().err
