"""Steps of hybrids on two ZeRO-3 ranks: roles, routers and shared blocks beside the plain engine; bf16 and buffers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from statex_dist.checkpoint.manifest import Manifest
from statex_dist.distributed.env import read_env
from statex_dist.run_parts import build_engine, build_loader, build_model
from tests.checkpoints_tools.builders import run_expand
from tests.distributed_test import run_distributed_test
from tests.engine.test_loading import save
from tests.engine.test_zero3_steps import configure
from tests.models.hybrid.hosts import save_host
from tests.runs import make_shards

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

RANKS = 2
BIAS = "e_score_correction_bias"
PLAIN = ("--engine.name", "plain")
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "routers": ("qwen3_next", ("--engine.router_loss", "0.5")),
    "shared blocks": ("zamba2", ("--optimizer.lr_factors.new", "4.0", "--optimizer.lr_factors.base", "0.5")),
    "expanded layers alone": ("zamba2", ("--optimizer.train", "expanded")),
    "bf16": ("nemotron_h", ("--engine.precision", "bf16")),
}
PLANS = {
    "qwen3_next": {"op": "mix_heads", "init": "lossless", "factor": 2, "layers": "0"},
    "zamba2": {"op": "grow_state", "init": "inherit", "factor": 2, "layers": "0"},
    "nemotron_h": {"op": "grow_state", "init": "inherit", "factor": 2, "layers": "0"},
}


def steps(directory: Path, case: str, *more: str) -> dict[str, Any]:
    """Run three steps and save; return what they gave."""
    kind, arguments = CASES[case]
    config = configure(directory, {}, "--model.path", str(directory / kind), *arguments, *more)
    env = read_env()
    model = build_model(config)
    for name, buffer in model.named_buffers():
        if name.endswith(BIAS):
            buffer.copy_(torch.linspace(-1, 1, len(buffer)) / 3)  # not a number of bf16
    start = {name: buffer.clone() for name, buffer in model.named_buffers()}
    loader = build_loader(config, config.data.open_stores(), model.config, env)
    engine = build_engine(config, model, env)
    batches, found = iter(loader), []
    for _ in range(3):
        loss = engine.forward_backward(next(batches))
        found.append({"loss": loss, "router": engine.router_loss, "norms": engine.grad_norms()})
        engine.step()
    batches.close()
    buffers = dict(model.named_buffers())
    tag = directory / f"{case.replace(' ', '-')}-{engine.kind}"
    tag.mkdir(exist_ok=True)
    files = engine.capture(tag, {})
    saved = next(content for _, content in files if "module" in content)["module"]
    moved = [name for name in start if not torch.equal(buffers[name], start[name])]
    if case == "bf16":
        save(engine, tag)
        for name, buffer in buffers.items():
            if name.endswith(BIAS):
                buffer.zero_()
        engine.barrier()
        engine.load(tag, engine.read(tag, Manifest.read(tag)))
    if engine.kind != "plain":
        engine.engine.destroy()  # the process group stays: DeepSpeed remembers its groups
    return {
        "steps": found,
        "changed": [name for name in start if buffers[name].dtype != start[name].dtype],
        "moved": moved,
        "lost": [name for name in start if not torch.equal(buffers[name], start[name])],
        "persistent": sorted(set(buffers) & set(model.state_dict())),
        "saved": {name: str(value.dtype) for name, value in saved.items() if name in buffers},
        "dtypes": {str(parameter.dtype) for parameter in model.parameters()},
    }


def work(rank: int, directory: Path) -> dict[str, Any]:
    return {case: steps(directory, case) for case in CASES}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("steps")
    make_shards(directory / "data", num_documents=12)
    for kind, plan in PLANS.items():
        save_host(kind, directory / f"{kind}-hub", vocab_size=258, eos_token_id=256, pad_token_id=257)
        run_expand(directory / f"{kind}-hub", directory / kind, **plan)
    return directory


@pytest.fixture(scope="module")
def found(directory: Path) -> dict[str, Any]:
    return run_distributed_test(work, RANKS, directory, group=False)[0]


@pytest.mark.parametrize("case", [case for case in CASES if case != "bf16"])
def test_steps_equal_those_of_the_plain_engine(found, directory: Path, case: str):
    ours, plain = found[case]["steps"], steps(directory, case, *PLAIN)["steps"]
    for mine, other in zip(ours, plain, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=5e-5)
        assert mine["norms"] == pytest.approx(other["norms"], rel=2e-3)
        assert mine["router"] == (None if case != "routers" else pytest.approx(other["router"], rel=1e-4))
    assert ours[-1]["loss"] != pytest.approx(ours[0]["loss"], rel=1e-3), "something must have been learnt"


def test_bf16_leaves_buffers_as_they_are_and_saves_them(found):
    run = found["bf16"]
    assert run["dtypes"] == {"torch.bfloat16"}
    assert not run["changed"]
    assert not run["moved"]
    assert not run["lost"], "of the biases that were set to zero before the checkpoint was read"
    biases = [name for name in run["persistent"] if name.endswith(BIAS)]
    assert biases
    assert all(run["saved"][name] == "torch.float32" for name in biases)
    losses = [step["loss"] for step in run["steps"]]
    assert losses[-1] < losses[0]
