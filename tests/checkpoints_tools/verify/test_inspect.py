"""Output of ``statex inspect`` for every layout, and for incomplete checkpoints."""

import json
import shutil
import subprocess
import sys
import time

import pytest

from benchmarks.synthetic_zero3 import write_zero3
from checkpoints_tools.reshard.reshard import reshard
from checkpoints_tools.verify.inspect import inspect
from statex_dist.errors import CheckpointError
from statex_dist.models.registry import config_from_dict
from tests.checkpoints_tools.builders import GLA, random_tensors, run_expand, write_model
from tests.checkpoints_tools.verify.test_integrity import LAYOUTS


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("inspect")
    write_model(root / "source", GLA)
    run_expand(root / "source", root / "base", factor=2, layers="0,2")
    for name, options in LAYOUTS.items():
        reshard(root / "base", root / name, **options)
    write_zero3(root / "foreign/global_step1", random_tensors(GLA), 2)
    return root


@pytest.mark.parametrize(("layout", "ranks"), [("hf", None), ("zero3", 3), ("tp", 2), ("megatron", None)])
def test_every_layout(root, layout, ranks):
    facts = inspect(root / layout)
    config = config_from_dict(json.loads((root / "base/config.json").read_text()))
    assert (facts.kind, facts.model_type, facts.world_size, facts.complete) == (layout, "gla", ranks, True)
    assert facts.state_numbers == config.state_elements
    assert facts.plan == config.statex.to_dict()
    assert facts.manifest == "sizes agree"
    assert facts.dtypes == {"float32": facts.tensors}
    assert facts.parameters == inspect(root / "base").parameters
    assert facts.problem is None
    assert facts.bytes == sum(
        p.stat().st_size for p in (root / layout).rglob("*") if p.is_file() and p.name != "latest"
    )
    json.dumps(facts.to_dict())


def test_a_foreign_training_checkpoint(root):
    facts = inspect(root / "foreign")
    assert (facts.kind, facts.step, facts.world_size, facts.complete) == ("zero3", 1, 2, True)
    assert facts.states == ["exp_avg", "exp_avg_sq"]
    assert (facts.manifest, facts.model_type, facts.plan) == ("no MANIFEST.json", None, None)


@pytest.mark.parametrize(
    ("layout", "file", "problem"),
    [
        ("hf", "model.safetensors", None),
        ("hf", "tokenizer_config.json", "tokenizer_config.json is missing; MANIFEST.json lists it"),
        ("zero3", "zero_pp_rank_1_mp_rank_00_optim_states.pt", "optim_states.pt is missing; MANIFEST.json lists it"),
        ("foreign", "zero_pp_rank_1_mp_rank_00_model_states.pt", "the model states of rank 1 are missing"),
        ("tp", "model-tp-01-of-02.safetensors", "model-tp-01-of-02.safetensors is missing"),
        ("megatron", "common.pt", "common.pt is missing; MANIFEST.json lists it"),
    ],
)
def test_what_is_missing_is_said(root, tmp_path, layout, file, problem):
    shutil.copytree(root / layout, tmp_path / "copy")
    next((tmp_path / "copy").rglob(file)).unlink()
    if problem is None:
        with pytest.raises(CheckpointError, match="not a checkpoint"):
            inspect(tmp_path / "copy")
        return
    facts = inspect(tmp_path / "copy")
    assert facts.complete is False
    assert problem in facts.problem
    assert facts.kind == inspect(root / layout).kind
    assert facts.files > 0


def test_an_interrupted_copy_of_a_tag(root, tmp_path):
    """Files of one rank only, as on a cluster without a shared file system."""
    shutil.copytree(root / "foreign", tmp_path / "copy")
    for path in (tmp_path / "copy").rglob("*_rank_0_*"):
        path.unlink()
    facts = inspect(tmp_path / "copy")
    assert facts.complete is False
    assert "states of rank 0 are missing" in facts.problem


def test_the_command(root, tmp_path):
    for name, code in (("zero3", 0), ("hf", 0)):
        done = subprocess.run(
            [sys.executable, "-m", "launch.cli", "inspect", str(root / name), "--json"], capture_output=True, text=True
        )
        assert done.returncode == code, done.stderr
        assert json.loads(done.stdout)["kind"] == name
    shutil.copytree(root / "foreign", tmp_path / "copy")
    next((tmp_path / "copy").rglob("*_1_*model*")).unlink()
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", "inspect", str(tmp_path / "copy")], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "the model states of rank 1 are missing" in " ".join(done.stdout.split())
    assert "Traceback" not in done.stderr


def test_a_thousand_files_are_not_opened(tmp_path):
    tensors = {f"layer.{i}.weight": tensor for i, tensor in enumerate(random_tensors(GLA).values())}
    write_zero3(tmp_path / "global_step1", tensors, 500)
    start = time.process_time()
    facts = inspect(tmp_path)
    assert (facts.files, facts.world_size, facts.complete) == (1000, 500, True)
    assert time.process_time() - start < 5, "it took as long as opening every file"
