"""The ``statex`` command as a user meets it: exit codes and one readable line for every mistake."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launch.cli import COMMANDS, main
from statex_dist.models.registry import config_from_dict
from tests.runs import GLA, MAMBA2, REPOSITORY, make_shards, save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(config_from_dict(GLA), tmp_path_factory.mktemp("cli") / "model")


def edited(model: Path, directory: Path, **changes) -> Path:
    """Return a copy of a model directory with another config."""
    directory.mkdir()
    config = json.loads((model / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **changes}))
    (directory / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    return directory


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that must be refused and return its one line."""
    assert main([str(argument) for argument in arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: statex ")
    assert f" {command} " in text.split("options:")[0]


def test_the_installed_command_answers():
    result = subprocess.run(
        [str(Path(sys.executable).parent / "statex"), "plan", "nowhere"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert result.stderr.strip() == "error: model directory or checkpoint not found: nowhere"


def test_help_costs_no_heavy_import():
    heavy = ("torch", "deepspeed", "transformers", "matplotlib")
    code = f"import sys, launch.cli as c; c.build_parser(); print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert result.stdout.strip() == "[]"


def test_plan_expand_inspect_from_the_command_line(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--layers", "0,2", "--factor", "2", "--init", "inherit"]
    assert main(["plan", str(model), *options, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert main(["expand", "--source", str(model), "--target", str(tmp_path / "big"), *options]) == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "big"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    base = 3 * 4 * 4 * 8
    assert found["state_numbers"] == base * 5 // 3
    assert str(base * 5 // 3) in json.dumps(planned)


def test_wrong_plans(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    five = edited(model, tmp_path / "five", num_heads=5, hidden_size=40)
    (five / "model.safetensors").unlink()
    assert "groups of 2" in refused(capsys, "plan", five, "--layers", "0", "--factor", 2)
    assert "layer 9" in refused(capsys, "plan", model, "--layers", "9")
    assert "--layers 'odd'" in refused(capsys, "plan", model, "--layers", "odd")
    assert "--init" in refused(capsys, "plan", model, "--init", "magic")


def test_wrong_checkpoints(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    llama = edited(model, tmp_path / "llama", model_type="llama")
    assert "model_type 'llama'" in refused(capsys, "plan", llama)
    cut = edited(model, tmp_path / "cut")
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    message = refused(capsys, "expand", "--source", cut, "--target", tmp_path / "out")
    assert "model.safetensors" in message
    assert not (tmp_path / "out").exists()
    assert "model.safetensors" in refused(capsys, "eval", "mqar", "--out", tmp_path / "e", "--model", cut)
    (tmp_path / "empty").mkdir()
    assert "not a checkpoint" in refused(capsys, "plan", tmp_path / "empty")
    assert "nowhere" in refused(capsys, "reshard", "--source", "nowhere", "--target", tmp_path / "r", "--to", "hf")
    assert "--to" in refused(capsys, "reshard", "--source", model, "--target", tmp_path / "r", "--to", "gguf")


def test_options_are_never_guessed(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    message = refused(capsys, "expand", "--source", model, "--target", tmp_path / "x", "--layer", "first:1")
    assert "--layer" in message
    assert not (tmp_path / "x").exists()


def test_a_run_or_a_model_without_tokenizer_is_named_for_what_it_is(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert "complete checkpoint" in refused(capsys, "plan", tmp_path / "run")
    message = refused(capsys, "eval", "recall", "--model", model, "--out", tmp_path / "e")
    assert "give --tokenizer bytes" in message


def test_targets_are_not_overwritten(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    full = tmp_path / "full"
    full.mkdir()
    (full / "precious").write_text("x")
    message = refused(capsys, "expand", "--source", model, "--target", full, "--layers", "0")
    assert "pass --overwrite" in message
    assert [p.name for p in full.iterdir()] == ["precious"]


def test_wrong_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert "nowhere" in refused(capsys, "prepare", "nowhere.txt", "--out", tmp_path / "o")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert "latin.txt" in refused(capsys, "prepare", tmp_path / "latin.txt", "--out", tmp_path / "o")
    (tmp_path / "none").mkdir()
    assert "none" in refused(capsys, "prepare", tmp_path / "none", "--out", tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_the_training_script_refuses_a_bad_config(tmp_path: Path):
    shards, file = make_shards(tmp_path), tmp_path / "run.yaml"
    good = {"run_dir": str(tmp_path / "run"), "model": {"config": MAMBA2}, "data": {"path": str(shards)}}
    script = [sys.executable, str(REPOSITORY / "launch" / "train.py"), "--config", str(file)]
    for section, expected in (
        ({"train": {"num_steps": 2, "steps": 3}}, "unknown key 'train.steps'; allowed here: hang_minutes, keep_every"),
        ({"train": {"num_steps": "many"}}, 'Parser key "train.num_steps"'),
    ):
        file.write_text(json.dumps({**good, **section}))
        result = subprocess.run(script, capture_output=True, text=True, check=False)
        assert result.returncode == 2
        assert result.stderr.count("\n") == 1
        assert expected in result.stderr


def test_the_demo_refuses_what_is_not_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "data").mkdir()
    (tmp_path / "precious").write_text("x")
    assert "no earlier demo (.statex-demo)" in refused(capsys, "demo", "--out", tmp_path, "--overwrite")
    assert "pass --overwrite" in refused(capsys, "demo", "--out", tmp_path)
    (tmp_path / ".statex-demo").touch()
    assert "--seeds must" in refused(capsys, "demo", "--out", tmp_path, "--overwrite", "--seeds", "0")
    assert (tmp_path / "precious").exists()
    assert "'gpt'" in refused(capsys, "demo", "--out", tmp_path / "d", "--family", "gpt")
