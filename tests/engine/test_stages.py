"""ZeRO stages on two real ranks: bf16 beside stage 3, saving and resuming, foreign code, another stage."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from statex_dist.config import parse_config
from statex_dist.distributed.env import read_env
from statex_dist.engine.checkpoint_retention import SavePolicy
from statex_dist.engine.checkpoints import Checkpoints
from statex_dist.engine.documents import Documents
from statex_dist.errors import CheckpointError
from statex_dist.run_config import RunConfig
from statex_dist.run_parts import build_engine, build_loader, build_model
from tests.distributed_test import run_distributed_test
from tests.runs import MAMBA2, expanded, make_shards, save_model, write_run

pytestmark = pytest.mark.distributed

STEPS, SAVED = 4, 2
FRESH = ("fp32-0", "fp32-1", "bf16-1")
FP32_REDUCTION = {"precision": "bf16", "deepspeed": {"communication_data_type": "fp32"}}
VARIANTS: dict[str, dict[str, Any]] = {
    **{f"fp32-{stage}": {"stage": stage} for stage in (0, 1, 2)},
    **{f"bf16-{stage}": {"stage": stage, **FP32_REDUCTION} for stage in (1, 2, 3)},
}


def configure(directory: Path, engine: dict[str, Any]) -> RunConfig:
    """Return a run of a model with tied parameters, of which some are frozen."""
    file = write_run(
        directory / f"run{os.getpid()}.yaml",
        run_dir=str(directory / "run"),
        model={"path": str(directory / "model")},
        data={"path": str(directory / "data" / "shards")},
        engine=engine,
        optimizer={"lr": 0.003, "gradient_clipping": 0.5, "freeze": [r"layers\.0\.mixer\.(in_proj|D)"]},
    )
    return parse_config(RunConfig, ["--config", str(file)], prog="train.py")


class Run:
    """An engine with the batches and the checkpoints of a run."""

    def __init__(self, config: RunConfig, directory: Path):
        env, model = read_env(), build_model(config)
        loader = iter(build_loader(config, config.data.open_stores(), model.config, env))
        self.all_batches = [next(loader) for _ in range(STEPS)]
        self.batches = iter(self.all_batches)
        loader.close()
        self.engine = build_engine(config, model, env)
        text = json.dumps(model.config.to_dict())
        documents = Documents(model={"config.json": text}, settings=config.resolved())
        directory.mkdir(exist_ok=True)
        self.checkpoints = Checkpoints(self.engine, directory, documents, SavePolicy())

    def steps(self, count: int) -> list[tuple[float, dict[str, float]]]:
        """Return losses and gradient norms of the next steps."""
        found = []
        for _ in range(count):
            loss = self.engine.forward_backward(next(self.batches), observe_states=False)
            found.append((loss, self.engine.grad_norms()))
            assert self.engine.step().updated
        return found

    def rewind(self) -> None:
        """Go back to the batches after the save."""
        self.batches = iter(self.all_batches[SAVED:])

    def close(self) -> None:
        self.engine.engine.destroy()  # the process group stays: DeepSpeed remembers its groups


def work(rank: int, directory: Path) -> dict[str, Any]:
    """Train and save in each variant, and resume: with each of DeepSpeed's optimizers in an engine of its own."""
    found: dict[str, Any] = {}
    for name, settings in VARIANTS.items():
        run = Run(configure(directory, settings), directory / name)
        before = run.steps(SAVED)
        run.checkpoints.save(SAVED, {"rank": rank}, last=True)
        after = run.steps(STEPS - SAVED)
        if name in FRESH:
            run.close()
            run = Run(configure(directory, settings), directory / name)
            run.steps(1)  # so that parameters are not those of the checkpoint
        run.rewind()
        state = run.checkpoints.resume()
        assert state is not None
        again = run.steps(STEPS - SAVED)
        found[name] = {"before": before, "after": after, "again": again, "rank": state["rank"], "step": state["step"]}
        if name == "fp32-1":
            found["foreign"] = foreign(run, directory)
        if name == "fp32-2":
            run.checkpoints.directory = directory / "fp32-1"
            with pytest.raises(CheckpointError) as caught:
                run.checkpoints.resume()
            found["refused"] = str(caught.value)
        run.close()
    run = Run(configure(directory, {"stage": 1, "precision": "bf16"}), directory / "bf16-1")
    found["bf16-1-default"] = run.steps(SAVED)
    run.close()
    return found


class Evil:
    def __reduce__(self):
        return os.system, ("true",)


def foreign(run: Run, directory: Path) -> dict[str, str]:
    """Return why a checkpoint of stage 1 with code in one file is refused, by that file."""
    found = {}
    for name in ("mp_rank_00_model_states.pt", "rank_1_client_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        copy = directory / f"foreign-{name}"
        if run.engine.rank == 0:
            shutil.copytree(directory / "fp32-1" / f"global_step{SAVED}", copy)
            torch.save({"module": Evil()}, copy / name)
        run.engine.barrier()
        with pytest.raises(CheckpointError) as caught:
            run.engine.load(copy)
        found[name] = str(caught.value)
    return found


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("stages")
    make_shards(directory / "data")
    save_model(expanded(MAMBA2), directory / "model")
    return directory


@pytest.fixture(scope="module")
def found(directory: Path) -> list[dict[str, Any]]:
    return run_distributed_test(work, 2, directory, group=False)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_resumed_run_is_bit_for_bit_the_same(found: list[dict[str, Any]], name: str):
    for rank, answers in enumerate(found):
        answer = answers[name]
        assert (answer["rank"], answer["step"]) == (rank, SAVED), "each rank gets its own client state"
        assert answer["again"] == answer["after"]


@pytest.mark.parametrize("stage", [1, 2])
def test_bf16_equals_stage_3_where_gradients_are_reduced_in_fp32(found: list[dict[str, Any]], stage: int):
    ours, reference = found[0][f"bf16-{stage}"], found[0]["bf16-3"]
    for (loss, norms), (expected, expected_norms) in zip(
        ours["before"] + ours["after"], reference["before"] + reference["after"], strict=True
    ):
        assert loss == pytest.approx(expected, rel=1e-4)
        assert norms == pytest.approx(expected_norms, rel=2e-3)
    assert ours["before"][0][0] == pytest.approx(reference["before"][0][0], rel=1e-7)


def test_bf16_stage_1_reduces_in_fp32_by_default(found: list[dict[str, Any]]):
    assert found[0]["bf16-1-default"] == found[0]["bf16-1"]["before"]


def test_another_stage_is_refused(found: list[dict[str, Any]]):
    message = found[0]["refused"]
    assert "engine.stage 1" in message
    assert "engine.stage 2" in message
    assert "\n" not in message


def test_every_file_is_checked_for_foreign_code(found: list[dict[str, Any]]):
    for name, message in found[0]["foreign"].items():
        assert f"{name} holds foreign code" in message
