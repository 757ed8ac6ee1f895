"""Single steps of every ZeRO stage on two real ranks beside the plain engine's: norms, skipped steps, segments."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from statex_dist.config import parse_config
from statex_dist.distributed.env import read_env
from statex_dist.run_config import RunConfig
from statex_dist.run_parts import build_engine, build_loader, build_model, open_values
from tests.distributed_test import run_distributed_test
from tests.runs import GLA, expanded, make_shards, save_model, write_run

pytestmark = pytest.mark.distributed

RANKS = 2
VARIANTS = {
    "whole": {},
    "segments": {"segment_tokens": 50},
    "offloaded": {"offload_optimizer": "cpu"},
    "offloaded parameters": {"offload_optimizer": "cpu", "offload_parameters": "cpu"},
    "stage 2": {"stage": 2},
    "stage 1": {"stage": 1},
    "stage 0": {"stage": 0},
}


def steps(config: RunConfig) -> list[dict[str, Any]]:
    """Run five steps of which the third is to be skipped and the fourth has a gradient that is not finite."""
    env = read_env()
    values = open_values(config)
    model = build_model(config, values)
    loader = build_loader(config, config.data.open_stores(), model.config, env)
    engine = build_engine(config, model, env, values)
    batches, found = iter(loader), []
    for number in range(1, 6):
        loss = engine.forward_backward(next(batches), observe_states=number == 5)
        norms = engine.grad_norms()
        if number == 4:
            poison(engine)
        result = engine.step(skip=number == 3)
        found.append({"loss": loss, "norms": norms, "lr": result.lr, "updated": result.updated})
    found[-1]["state_norms"] = engine.state_norms()
    batches.close()
    if engine.kind != "plain":
        engine.engine.destroy()  # the process group stays: DeepSpeed remembers its groups
    return found


def poison(engine: Any) -> None:
    """Spoil one gradient on one rank as a division by zero would."""
    if engine.kind == "plain":
        return
    if engine.rank == 1 or engine.stage == 0:  # all ranks have the same gradient there
        zero = engine.engine.optimizer
        if engine.stage == 0:
            zero.param_groups[0]["params"][0].grad.fill_(torch.inf)
        elif engine.stage == 3 and zero.offload_optimizer:
            next(iter(zero.norm_for_param_grads.values())).fill_(torch.inf)
        else:
            zero.averaged_gradients[0][0].fill_(torch.inf)


def work(rank: int, directory: Path) -> dict[str, list[dict[str, Any]]]:
    return {name: steps(configure(directory, engine)) for name, engine in VARIANTS.items()}


def configure(directory: Path, engine: dict[str, Any], *arguments: str) -> RunConfig:
    file = write_run(
        directory / f"run{os.getpid()}.yaml",
        run_dir=str(directory / "run"),  # ranks that differ in a setting are refused
        model={"path": str(directory / "model")},
        data={"path": str(directory / "data" / "shards")},
        engine=engine,
        optimizer={"lr": 0.01, "gradient_clipping": 0.5},
    )
    return parse_config(RunConfig, ["--config", str(file), *arguments], prog="train.py")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("steps")
    make_shards(directory / "data")
    save_model(expanded(GLA), directory / "model")
    return directory


@pytest.fixture(scope="module")
def found(directory: Path) -> dict[str, list[dict[str, Any]]]:
    return run_distributed_test(work, RANKS, directory, group=False)[0]


@pytest.fixture(scope="module")
def plain(directory: Path) -> dict[str, list[dict[str, Any]]]:
    """The same steps without DeepSpeed; the poisoned step is skipped by hand."""
    from statex_dist.engine.plain import PlainEngine

    step, results = PlainEngine.step, {}
    for name in ("whole", "segments"):
        calls = []

        def stepped(self: PlainEngine, *, skip: bool = False, calls: list[int] = calls) -> Any:
            calls.append(1)
            return step(self, skip=skip or len(calls) == 4)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PlainEngine, "step", stepped)
            results[name] = steps(configure(directory, VARIANTS[name], "--engine.name", "plain"))
    return results


@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_equal_those_of_the_plain_engine(found, plain, variant: str):
    ours, reference = found[variant], plain["segments" if variant == "segments" else "whole"]
    assert [step["updated"] for step in ours] == [True, True, False, False, True]
    assert [step["lr"] for step in ours] == [step["lr"] for step in reference]
    assert [step["loss"] for step in ours] == pytest.approx([step["loss"] for step in reference], rel=2e-5)
    for mine, other in zip(ours, reference, strict=True):
        assert mine["norms"] == pytest.approx(other["norms"], rel=1e-4)
    assert len(ours[0]["norms"]) == 2, "with and without weight decay"
    assert ours[1]["loss"] != pytest.approx(ours[4]["loss"], rel=1e-3), "something must have been learnt"
    assert set(ours[-1]["state_norms"]) == {"0", "1", "2", "3"}


def test_segments_have_the_whole_loss_and_a_truncated_gradient(plain):
    whole, cut = plain["whole"][0], plain["segments"][0]
    assert cut["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    assert cut["norms"] != pytest.approx(whole["norms"], rel=1e-3)
