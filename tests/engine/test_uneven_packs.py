"""Four packs a step on three real ranks: two of them run a dummy pack, and nothing of it can be seen."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from statex_dist.batch import PackedBatch
from statex_dist.checkpoint.layout import complete_tags
from statex_dist.checkpoint.manifest import Manifest
from statex_dist.config import parse_config
from statex_dist.distributed.env import read_env
from statex_dist.run_config import RunConfig
from statex_dist.run_parts import build_engine, build_loader, build_model
from statex_dist.train.metrics import read_metrics
from tests.distributed_test import run_distributed_test
from tests.runs import GLA, expanded, losses, make_shards, run_training, save_model, write_run

pytestmark = pytest.mark.distributed

RANKS, PACKS, STEPS = 3, 4, 3
OPTIONS = {
    "whole": {"data": {"long_documents": "carry"}},
    "segments": {"engine": {"segment_tokens": 50}, "train": {"state_passing": 0.5}},
}
OWN_PACKS = [1, 1, 2]


def configure(directory: Path, options: dict[str, Any], *arguments: str) -> RunConfig:
    file = write_run(
        directory / "run.yaml",
        model={"path": str(directory / "model")},
        data={"path": str(directory / "data" / "shards"), "seq_len": 96, **options.get("data", {})},
        **{name: section for name, section in options.items() if name != "data"},
    )
    return parse_config(RunConfig, ["--config", str(file), *arguments], prog="train.py")


def steps(config: RunConfig, tokens: int | None = None) -> dict[str, Any]:
    """Train a few steps; dummies have random tokens, or some of the rank's own."""
    env = read_env()
    model = build_model(config)
    loader = build_loader(config, config.data.open_stores(), model.config, env)
    engine = build_engine(config, model, env)
    batches = iter(loader)
    found: dict[str, Any] = {"losses": [], "norms": [], "gradients": [], "packs": []}
    for number in range(STEPS):
        batch = [other_tokens(pack, tokens) if pack.dummy and tokens else pack for pack in next(batches)]
        found["losses"].append(engine.forward_backward(batch, observe_states=number == 0))
        found["norms"].append(engine.grad_norms())
        if engine.kind != "plain":
            gradients = engine.engine.optimizer.averaged_gradients
            found["gradients"] += [g.clone() for group in gradients.values() for g in group]
        found["packs"].append(engine.num_packs)
        found["states"] = engine.state_norms()
        engine.step()
    found["carried"] = engine.carried.state_dict()
    batches.close()
    if engine.kind != "plain":
        engine.engine.destroy()  # the process group stays: DeepSpeed remembers its groups
    return found


def other_tokens(dummy: PackedBatch, seed: int) -> PackedBatch:
    """Return a dummy of other tokens; its length decides on the number of segments, and stays."""
    ids = torch.randint(0, 256, dummy.input_ids.shape, generator=torch.Generator().manual_seed(seed))
    return dataclasses.replace(dummy, input_ids=ids)


def work(rank: int, directory: Path) -> dict[str, list[dict[str, Any]]]:
    return {
        name: [steps(configure(directory / f"rank{rank}", OPTIONS[name], *shared(directory)), t) for t in dummies]
        for name, dummies in {"whole": [None], "segments": [None, 7]}.items()
    }


def shared(directory: Path) -> list[str]:
    """Return the paths that are the same on all ranks."""
    paths = {"run_dir": "run", "model.path": "model", "data.path": "data/shards"}
    return [word for name, path in paths.items() for word in (f"--{name}", str(directory / path))]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("uneven")
    make_shards(directory / "data")
    save_model(expanded(GLA), directory / "model")
    for rank in range(4):
        (directory / f"rank{rank}").mkdir()
    return directory


@pytest.fixture(scope="module")
def found(directory: Path) -> list[dict[str, list[dict[str, Any]]]]:
    return run_distributed_test(work, RANKS, directory, group=False)


def plain(directory: Path, name: str) -> dict[str, Any]:
    return steps(configure(directory, OPTIONS[name], "--engine.name", "plain"))


def test_losses_and_norms_are_those_of_one_rank(found, directory: Path):
    reference = plain(directory, "whole")
    for ranks in found:
        ours = ranks["whole"][0]
        assert ours["packs"] == [PACKS] * STEPS
        assert ours["losses"] == pytest.approx(reference["losses"], rel=1e-6)
        for mine, other in zip(ours["norms"], reference["norms"], strict=True):
            assert mine == pytest.approx(other, rel=1e-5)
    lanes = [int(lane) for ranks in found for lane in ranks["whole"][0]["carried"]]
    assert lanes == [int(lane) for lane in sorted(reference["carried"])], "lanes are counted without dummies"
    assert lanes, "no document was long enough"
    assert reference["losses"][-1] < reference["losses"][0]


def test_nothing_depends_on_what_a_dummy_holds(found):
    for ranks in found:
        one, other = ranks["segments"]
        assert one["losses"] == other["losses"]
        assert one["gradients"]
        assert all(torch.equal(a, b) for a, b in zip(one["gradients"], other["gradients"], strict=True))


def test_state_passing_and_measured_states_leave_dummies_out(found):
    for own, ranks in zip(OWN_PACKS, found, strict=True):
        one, other = ranks["segments"]
        assert one["carried"]["passing"]["packs"] == own * 2 * STEPS, "a pack has two segments"
        kept, same = one["carried"]["passing"]["kept"], other["carried"]["passing"]["kept"]
        assert all(torch.equal(a, b) for x, y in zip(kept, same, strict=True) for a, b in zip(x, y, strict=True))
        assert one["states"] == other["states"]


def context_work(rank: int, directory: Path) -> dict[str, Any]:
    options = {"data": {"packs_per_step": 3}, "parallel": {"context": 2}, "engine": {"segment_tokens": 50}}
    return steps(configure(directory / f"rank{rank}", options, *shared(directory)))


@pytest.mark.slow
def test_context_groups_share_a_dummy_too(directory: Path):
    options = {"data": {"packs_per_step": 3}, "engine": {"segment_tokens": 50, "name": "plain"}}
    reference = steps(configure(directory, options))
    for ours in run_distributed_test(context_work, 4, directory, group=False):
        assert ours["packs"] == [3] * STEPS
        assert ours["losses"] == pytest.approx(reference["losses"], rel=1e-5)


@pytest.mark.slow
def test_a_run_is_saved_with_uneven_packs_and_resumed_on_other_ranks(directory: Path, tmp_path: Path):
    """In the middle of an epoch, from three ranks to two, and once more to three."""
    sections = {
        "model": {"path": str(directory / "model")},
        "data": {"path": str(directory / "data" / "shards"), "packs_per_step": PACKS},
        "train": {"num_steps": 9, "save_every": 3},
        "schedule": {"name": "constant"},
    }
    whole = write_run(tmp_path / "whole.yaml", **{**sections, "engine": {"name": "plain"}})
    assert run_training(1, "--config", str(whole)).returncode == 0
    file = write_run(tmp_path / "run.yaml", **sections)
    for ranks, until in ((3, 3), (2, 6), (3, 9)):
        result = run_training(ranks, "--config", str(file), "--train.num_steps", str(until))
        assert result.returncode == 0, result.stderr
        newest = complete_tags(tmp_path / "run" / "checkpoints")[0]
        assert Manifest.read(tmp_path / "run" / "checkpoints" / newest).info["world_size"] == ranks
    ours, reference = read_metrics(tmp_path / "run"), read_metrics(tmp_path / "whole")
    for name in ("step", "epochs", "targets", "tokens"):
        assert [record[name] for record in ours] == [record[name] for record in reference]
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), rel=2e-5)
