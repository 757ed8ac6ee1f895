"""Groups, factors and frozen parameters under real ZeRO-3, through a checkpoint that is cut for another world size."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoints_tools.reshard.reshard import reshard
from statex_dist.config import parse_config
from statex_dist.models.registry import parameter_roles, read_config
from statex_dist.run import train
from statex_dist.run_config import RunConfig
from tests.runs import GLA, expanded, losses, make_shards, run_training, save_model, write_run

pytestmark = pytest.mark.distributed

OPTIMIZER = {"lr": 0.01, "train": "expanded", "freeze": [r"layers\.2\.mlp"], "lr_factors": {"new": 3.0, "gain": 10.0}}


def weights(run: Path, step: int, directory: Path) -> dict[str, torch.Tensor]:
    """Return what a run's checkpoint holds, as a model."""
    reshard(run / "checkpoints" / f"global_step{step}", directory, dtype="fp32")
    return load_file(directory / "model.safetensors")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(expanded({**GLA, "num_hidden_layers": 5}), tmp_path_factory.mktemp("gla"))


@pytest.mark.slow
def test_frozen_parameters_stay_and_the_others_train_as_in_plain_pytorch(tmp_path: Path, model: Path):
    shards = make_shards(tmp_path / "data")
    sections = {
        "model": {"path": str(model)},
        "data": {"path": str(shards)},
        "optimizer": OPTIMIZER,
        "schedule": {"name": "wsd", "warmup_steps": 2, "decay_steps": 2},
        "train": {"num_steps": 6, "save_every": 3},
    }
    file = write_run(tmp_path / "two.yaml", **sections)
    result = run_training(2, "--config", str(file))
    assert result.returncode == 0, result.stderr
    assert "in 66 of 90 tensors" in result.stderr.split("training ")[1]

    plain = write_run(tmp_path / "plain.yaml", **sections)
    assert train(parse_config(RunConfig, ["--config", str(plain), "--engine.name", "plain"], prog="train.py"))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "plain"), rel=2e-5)
    before = load_file(model / "model.safetensors")
    after = weights(tmp_path / "two", 6, tmp_path / "two-weights")
    state = tmp_path / "plain" / "checkpoints" / "global_step6" / "plain_state.pt"
    expected = torch.load(state, weights_only=True)["module"]
    roles = parameter_roles(read_config(model))
    for name, tensor in after.items():
        frozen = roles[name] == "base" or "layers.2.mlp" in name
        assert torch.equal(tensor, before[name]) is frozen, name
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")

    # Names and factors of the groups survive the tools and the load: one rank ends where two do.
    one = write_run(tmp_path / "one.yaml", **sections)
    reshard(tmp_path / "two/checkpoints/global_step3", tmp_path / "one/checkpoints", to="zero3", world_size=1)
    shutil.copy(tmp_path / "two/metrics.jsonl", tmp_path / "one/metrics.jsonl")
    result = run_training(1, "--config", str(one))
    assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), rel=2e-5)
    for name, tensor in weights(tmp_path / "one", 6, tmp_path / "one-weights").items():
        torch.testing.assert_close(tensor, after[name], rtol=1e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")
