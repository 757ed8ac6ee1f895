"""ZeRO-3 on real gloo ranks: the same numbers as plain PyTorch, and runs that survive being killed."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from statex_dist.checkpoint.layout import complete_tags
from statex_dist.config import parse_config
from statex_dist.models.registry import config_from_dict, make_plan
from statex_dist.run import train
from statex_dist.run_config import RunConfig
from tests.models.tiny import STATE_SPACES
from tests.runs import (
    GLA,
    MAMBA2,
    OTHERS,
    command,
    environment,
    expanded,
    losses,
    make_shards,
    run_training,
    save_model,
    write_run,
)

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def gla_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(expanded(GLA), tmp_path_factory.mktemp("gla"))


@pytest.fixture(scope="module")
def two_rank_run(tmp_path_factory: pytest.TempPathFactory, shards: Path, gla_model: Path) -> Path:
    """Return an uninterrupted run of 6 steps on 2 ranks."""
    directory = tmp_path_factory.mktemp("reference")
    file = write_run(directory / "run.yaml", model={"path": str(gla_model)}, data={"path": str(shards)})
    result = run_training(2, "--config", str(file))
    assert result.returncode == 0, result.stderr
    return directory / "run"


def train_plain(directory: Path, model: Path, shards: Path, **sections) -> Path:
    data = {"path": str(shards), **sections.pop("data", {})}
    file = write_run(directory / "plain.yaml", model={"path": str(model)}, data=data, **sections)
    arguments = ["--config", str(file), "--engine.name", "plain"]
    assert train(parse_config(RunConfig, arguments, prog="train.py"))
    return directory / "plain"


def zero3_tensors(run: Path) -> dict[str, torch.Tensor]:
    """Return a run's final fp32 parameters as DeepSpeed's own converter reads them."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    checkpoints = run / "checkpoints"
    return get_fp32_state_dict_from_zero_checkpoint(str(checkpoints), tag=complete_tags(checkpoints)[0])


def plain_tensors(run: Path) -> dict[str, torch.Tensor]:
    checkpoints = run / "checkpoints"
    path = checkpoints / complete_tags(checkpoints)[0] / "plain_state.pt"
    return torch.load(path, weights_only=True)["module"]


def assert_same_training(zero3: Path, plain: Path) -> None:
    ours, reference = losses(zero3), losses(plain)
    assert len(ours) == len(reference) == 6
    assert ours == pytest.approx(reference, rel=2e-5)
    assert abs(ours[0] - ours[-1]) > 0.05, "nothing was learnt, so equality would say little"
    expected = plain_tensors(plain)
    for name, tensor in zero3_tensors(zero3).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_two_ranks_train_as_plain_pytorch_does(tmp_path: Path, two_rank_run: Path, gla_model: Path, shards: Path):
    assert_same_training(two_rank_run, train_plain(tmp_path, gla_model, shards))


@pytest.mark.slow
def test_one_rank_mamba2_with_checkpointing_trains_as_plain_pytorch_does(tmp_path: Path, shards: Path):
    model = save_model(expanded(MAMBA2), tmp_path / "model")
    file = write_run(
        tmp_path / "run.yaml",
        model={"path": str(model)},
        data={"path": str(shards)},
        engine={"activation_checkpointing": "block"},
    )
    result = run_training(1, "--config", str(file))
    assert result.returncode == 0, result.stderr
    assert_same_training(tmp_path / "run", train_plain(tmp_path, model, shards))
    moved = {n: t for n, t in zero3_tensors(tmp_path / "run").items() if n.endswith(("A_log", "dt_bias", ".D"))}
    before = dict(torch.nn.Module.named_parameters(_load(model)))
    assert len(moved) == 6
    assert all(not torch.equal(tensor, before[name]) for name, tensor in moved.items())


@pytest.mark.slow
@pytest.mark.parametrize("family", OTHERS)
def test_other_families_train_on_two_ranks_as_plain_pytorch_does(tmp_path: Path, shards: Path, family: str):
    model = save_model(expanded(OTHERS[family]), tmp_path / "model")
    file = write_run(tmp_path / "run.yaml", model={"path": str(model)}, data={"path": str(shards)})
    result = run_training(2, "--config", str(file))
    assert result.returncode == 0, result.stderr
    assert_same_training(tmp_path / "run", train_plain(tmp_path, model, shards))


ATTENTION = {
    "gla": {**GLA, "attn": {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "window_size": 9}},
    "state_spaces": {
        **STATE_SPACES,
        **{"vocab_size": 258, "eos_token_id": 256, "pad_token_id": 257},
        "attn_cfg": {**STATE_SPACES["attn_cfg"], "d_conv": 4},
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("family", ATTENTION)
def test_models_with_attention_train_in_segments_as_plain_pytorch_does(tmp_path: Path, shards: Path, family: str):
    """A run that stops between segments' states continues with them: its documents go over the ends of packs."""
    config = make_plan(config_from_dict(ATTENTION[family]), layers="all", factor=2, init="inherit", op="grow_state")
    model = save_model(config, tmp_path / "model")
    sections = {
        "data": {"path": str(shards)},
        "engine": {"activation_checkpointing": "block", "segment_tokens": 48},
    }
    file = write_run(tmp_path / "run.yaml", model={"path": str(model)}, **sections)
    for steps in (3, 6):
        result = run_training(2, "--config", str(file), "--train.num_steps", str(steps), "--schedule.name", "constant")
        assert result.returncode == 0, result.stderr
    sections["schedule"] = {"name": "constant"}
    assert_same_training(tmp_path / "run", train_plain(tmp_path, model, shards, **sections))


def _load(directory: Path):
    from statex_dist.models.hf import from_pretrained

    return from_pretrained(directory)


@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit(tmp_path: Path, two_rank_run: Path, gla_model: Path, shards: Path):
    file = write_run(
        tmp_path / "run.yaml",
        model={"path": str(gla_model)},
        data={"path": str(shards)},
        train={"num_steps": 6, "save_every": 2},
    )
    process = subprocess.Popen(
        command(2, "--config", str(file)),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done_before = complete_tags(tmp_path / "run" / "checkpoints")
    assert done_before
    assert "global_step6" not in done_before

    result = run_training(2, "--config", str(file))
    assert result.returncode == 0, result.stderr
    assert "resuming from" in result.stderr
    assert losses(tmp_path / "run") == losses(two_rank_run)
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]
    reference = zero3_tensors(two_rank_run)
    for name, tensor in zero3_tensors(tmp_path / "run").items():
        assert torch.equal(tensor, reference[name]), name
    assert not list((tmp_path / "run" / "checkpoints").glob(".tmp-*"))


@pytest.mark.slow
def test_ranks_and_context_change_on_the_way(tmp_path: Path, gla_model: Path, shards: Path):
    """4 ranks in context groups of 2, then 2 ranks, then 3: the losses are those of one process all along."""
    sections = {
        "data": {"packs_per_step": 12},
        "train": {"save_every": 1, "save_async": True},
        "schedule": {"name": "constant"},
    }
    data = {"path": str(shards), **sections["data"]}
    file = write_run(tmp_path / "run.yaml", **{**sections, "model": {"path": str(gla_model)}, "data": data})
    for ranks, context, steps in ((4, 2, 2), (2, 1, 4), (3, 3, 6)):
        overrides = ["--parallel.context", str(context), "--train.num_steps", str(steps)]
        result = run_training(ranks, "--config", str(file), *overrides)
        assert result.returncode == 0, result.stderr
        assert "saved" in result.stderr
    checkpoints = tmp_path / "run" / "checkpoints"
    assert complete_tags(checkpoints)[:2] == ["global_step6", "global_step5"]
    assert json.loads((checkpoints / "global_step6/MANIFEST.json").read_text())["info"]["world_size"] == 3
    assert_same_training(tmp_path / "run", train_plain(tmp_path, gla_model, shards, **sections))


def test_bf16_trains(tmp_path: Path, shards: Path):
    file = write_run(
        tmp_path / "run.yaml",
        model={"config": GLA},
        data={"path": str(shards)},
        engine={"precision": "bf16"},
        metrics={"wandb_project": "statex-tests"},
        train={"num_steps": 3},
    )
    result = run_training(2, "--config", str(file))
    assert result.returncode == 0, result.stderr
    values = losses(tmp_path / "run")
    assert values[-1] < values[0]
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*")), "wandb should have recorded offline"
    saved = json.loads((tmp_path / "run/checkpoints/global_step3/model/config.json").read_text())
    assert saved.pop("train_length") <= 128
    assert config_from_dict(saved) == config_from_dict(GLA)


def test_checkpoint_files_with_foreign_code_are_named(tmp_path: Path, two_rank_run: Path):
    from statex_dist.engine.zero.foreign_code import foreign_code

    class Evil:
        def __reduce__(self):
            return os.system, ("true",)

    class ByName:
        """As Python 3.11.0 to 3.11.4 pickle a member of an enum."""

        def __init__(self, name):
            self.name = name

        def __reduce__(self):
            from deepspeed.runtime.zero.config import ZeroStageEnum

            return getattr, (ZeroStageEnum, self.name)

    torch.save({"module": Evil()}, tmp_path / "evil.pt")
    assert "evil.pt holds foreign code and is refused: posix.system" in (foreign_code(tmp_path / "evil.pt") or "")
    for name, refused in (("weights", False), ("__class__", True)):
        torch.save({"stage": ByName(name), "x": torch.ones(2)}, tmp_path / "named.pt")
        assert ("getattr" in (foreign_code(tmp_path / "named.pt") or "")) == refused
    files = list((two_rank_run / "checkpoints" / "global_step6").glob("*.pt"))
    assert len(files) == 4
    assert [foreign_code(path) for path in files] == [None] * 4
