"""ZeRO-3 checkpoints of models that transformers hosts, in other layouts; saved by DeepSpeed on two ranks."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from checkpoints_tools.expand.expand import expand, prepare_expansion
from checkpoints_tools.plan.options import PlanOptions
from checkpoints_tools.reshard.reshard import reshard
from checkpoints_tools.verify.verify import verify_expansion, verify_same
from statex_dist.errors import CheckpointError, ConfigError
from statex_dist.models.hf import from_pretrained
from statex_dist.models.registry import read_config
from tests.checkpoints_tools.builders import load_all
from tests.distributed_test import run_distributed_test
from tests.models.hybrid.hosts import HOSTS, VOCABULARY, save_host
from tests.raising import raises

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SAME_NAMES = ("bamba", "falcon_h1", "zamba2", "qwen3_5_text")
"""Hosts whose tensors have the names of the hub in memory too."""


def save_zero3(rank: int, root: Path) -> None:
    """Take a step of a learning rate of 0 with every host, so that there are optimizer states, and save it."""
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else a JIT build of two minutes
    deepspeed.init_distributed("gloo")
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True, "zero_optimization": zero}
    ids = torch.arange(9)[None] + rank
    for name in HOSTS:
        model = from_pretrained(root / name)
        optimizer = torch.optim.AdamW(list(model.parameters()), lr=0.0, weight_decay=0.0)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        engine.backward(engine(ids, labels=ids).loss_sum)
        engine.step()
        engine.save_checkpoint(str(root / f"{name}-zero3"), tag="global_step1")
        if rank == 0:
            folder = root / f"{name}-zero3/global_step1/model"
            folder.mkdir()
            shutil.copy(root / name / "config.json", folder)
        torch.distributed.barrier()
        engine.destroy()


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("hosts")
    for name in HOSTS:
        save_host(name, directory / name)
    run_distributed_test(save_zero3, 2, directory, group=False)
    return directory


def on_the_hub(name: str) -> str:
    """Return the hub's name of Kimi-Linear's dense layer, which transformers saves under the experts' name."""
    dense = name.startswith("model.layers.0.block_sparse_moe.") and name.split(".")[4].endswith("_proj")
    return name.replace("block_sparse_moe", "mlp") if dense else name


@pytest.mark.parametrize("name", HOSTS)
def test_files_are_those_of_save_pretrained(root, tmp_path, name):
    reshard(root / f"{name}-zero3", tmp_path / "out")
    derived = read_config(root / name).DERIVED
    wanted = {on_the_hub(n): tensor for n, tensor in load_all(root / name).items() if not n.endswith(derived)}
    found = load_all(tmp_path / "out")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[n], tensor) for n, tensor in wanted.items())
    for to, options in (("tp", {"tp": 2}), ("megatron", {})):
        reshard(root / f"{name}-zero3", tmp_path / to, to=to, **options)
        assert verify_same(tmp_path / "out", tmp_path / to).ok


@pytest.mark.parametrize("name", HOSTS)
def test_a_run_goes_on_with_another_number_of_ranks(root, tmp_path, name):
    summary = reshard(root / f"{name}-zero3", tmp_path / "three", to="zero3", world_size=3)
    assert summary.states == ["exp_avg", "exp_avg_sq"]
    verdict = verify_same(root / f"{name}-zero3", tmp_path / "three")
    assert verdict.ok, verdict.differences
    assert verdict.tensors["exp_avg"] > 0
    with raises(CheckpointError, name, "model.path"):
        reshard(root / name, tmp_path / "begun", to="zero3", world_size=2)


@pytest.mark.parametrize("name", HOSTS)
def test_a_run_grows_where_the_names_are_the_same(root, tmp_path, name):
    init = {"init": "lossless", "op": "grow_features", "layers": "all"}
    expansion = prepare_expansion(root / f"{name}-zero3", PlanOptions(**init, factor=2), training=True)
    if name not in SAME_NAMES:
        with raises(ConfigError, name, "hf"):
            expand(expansion, tmp_path / "grown", to="zero3")
        return
    expand(expansion, tmp_path / "grown", to="zero3")
    assert verify_expansion(root / f"{name}-zero3", tmp_path / "grown").ok
    ids = torch.arange(11)[None] % VOCABULARY
    with torch.no_grad():
        pair = [from_pretrained(path)(ids).logits for path in (root / name, tmp_path / "grown")]
    torch.testing.assert_close(*pair, rtol=0, atol=1e-6)
