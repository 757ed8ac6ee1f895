"""ZeRO stages on two real ranks: bf16 beside stage 3, saving and resuming, foreign code, another stage."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints_tools.reshard.reshard import reshard
from checkpoints_tools.verify.inspect import inspect
from checkpoints_tools.verify.verify import verify_alone
from statex_dist.checkpoint.formats.piece_io import blocks
from statex_dist.config import parse_config
from statex_dist.distributed.env import read_env
from statex_dist.engine.checkpoint_retention import SavePolicy
from statex_dist.engine.checkpoints import Checkpoints
from statex_dist.engine.documents import Documents
from statex_dist.errors import CheckpointError
from statex_dist.models.source import open_source
from statex_dist.run_config import RunConfig
from statex_dist.run_parts import build_engine, build_loader, build_model
from tests.checkpoints_tools.builders import load_all
from tests.distributed_test import run_distributed_test
from tests.runs import MAMBA2, expanded, make_shards, save_model, write_run

pytestmark = pytest.mark.distributed

STEPS, SAVED = 3, 2
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
        self.documents = Documents(model={"config.json": text}, settings=config.resolved())
        self.checkpoints = self.checkpoints_in(directory)

    def checkpoints_in(self, directory: Path) -> Checkpoints:
        directory.mkdir(exist_ok=True)
        return Checkpoints(self.engine, directory, self.documents, SavePolicy())

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
            run.checkpoints = run.checkpoints_in(directory / "later")
            run.checkpoints.save(STEPS, {}, last=True)
            run.checkpoints = run.checkpoints_in(directory / "fp32-1")
            with pytest.raises(CheckpointError) as caught:
                run.checkpoints.resume()
            found["refused"] = str(caught.value)
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
            run.engine.load(copy, None)
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


def test_another_stage_is_refused(found: list[dict[str, Any]]):
    message = found[0]["refused"]
    assert "engine.stage 1" in message
    assert "engine.stage 2" in message
    assert "\n" not in message


def test_every_file_is_checked_for_foreign_code(found: list[dict[str, Any]]):
    for name, message in found[0]["foreign"].items():
        assert f"{name} holds foreign code" in message


def continued(rank: int, directory: Path, names: tuple[str, ...]) -> dict[str, list[tuple[float, dict[str, float]]]]:
    """Resume runs of two ranks on the ranks of this test."""
    found = {}
    for name in names:
        run = Run(configure(directory, VARIANTS[name]), directory / name)
        run.rewind()
        state = run.checkpoints.resume()
        assert state is not None
        assert state["rank"] == rank % 2
        found[name] = run.steps(STEPS - SAVED)
        run.close()
    return found


@pytest.mark.parametrize("ranks", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_runs_continue_on_another_number_of_ranks(found: list[dict[str, Any]], directory: Path, ranks: int):
    names = tuple(BELOW_3) if ranks > 1 else ("fp32-1",)
    continuing = run_distributed_test(continued, ranks, directory, names, group=False)
    for name in names:
        exact = name.startswith("fp32")
        for (loss, norms), (expected, expected_norms) in zip(continuing[0][name], found[0][name]["after"], strict=True):
            assert loss == pytest.approx(expected, rel=1e-6 if exact else 2e-4)
            assert norms == pytest.approx(expected_norms, rel=1e-4 if exact else 2e-2)


BELOW_3 = [name for name in VARIANTS if not name.endswith("3")]


def converted(run: Path, name: str) -> dict[str, torch.Tensor]:
    """Return a checkpoint's tensors as DeepSpeed's converter reads them; of stage 0, which it does not, the model's."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    tag = f"global_step{SAVED}"
    module = torch.load(run / tag / "mp_rank_00_model_states.pt", weights_only=True)["module"]
    if name.endswith("0"):
        return module
    frozen = {n: module[n] for n in module if n.endswith(("layers.0.mixer.in_proj.weight", "layers.0.mixer.D"))}
    return {**frozen, **get_fp32_state_dict_from_zero_checkpoint(str(run), tag=tag)}


def of_state(run: Path, state: str) -> dict[str, torch.Tensor]:
    """Return an optimizer state by parameter, cut out of DeepSpeed's files by hand."""
    tag = run / f"global_step{SAVED}"
    model = torch.load(tag / "mp_rank_00_model_states.pt", weights_only=True)
    if not (paths := sorted(tag.glob("*optim_states.pt"))):
        names = [name for group in model["param_shapes"] for name in group]
        return {name: model["optimizer"]["state"][index][state] for index, name in enumerate(names)}
    files = [torch.load(path, weights_only=False)["optimizer_state_dict"] for path in paths]
    result = {}
    for group, shapes in enumerate(model["param_shapes"]):
        flat = torch.cat([file["base_optimizer_state"]["state"][group][state] for file in files])
        sizes = [shape.numel() for shape in shapes.values()]
        parts = flat.split([*sizes, flat.numel() - sum(sizes)])
        result |= {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=False)}
    return result


@pytest.mark.parametrize("name", BELOW_3)
def test_checkpoints_are_read_as_deepspeed_reads_them(found: Any, directory: Path, tmp_path: Path, name: str):
    run = directory / name
    expected = converted(run, name)
    assert {"lm_head.weight", "backbone.layers.0.mixer.in_proj.weight"} <= expected.keys()
    summary = reshard(run, tmp_path / "hf")
    assert (summary.kind, summary.verified) == (f"zero{name[-1]}", True)
    written = load_all(tmp_path / "hf")
    assert expected.keys() - written.keys() == {"lm_head.weight"}, "tied"
    for tensor in written:
        assert torch.equal(written[tensor], expected[tensor]), tensor
        assert written[tensor].dtype == expected[tensor].dtype
    source = open_source(run)
    assert source.facts.info["step"] == SAVED
    assert source.aliases == {"lm_head.weight": "backbone.embeddings.weight"}
    assert source.states().keys() == {"exp_avg", "exp_avg_sq"}
    for state, values in source.states().items():
        reference = of_state(run, state)
        assert set(values.keys()) == reference.keys()
        for parameter, tensor in reference.items():
            assert (
                b"".join(b.tobytes() for b in blocks(values, parameter, 1000)) == tensor.contiguous().numpy().tobytes()
            )
    assert verify_alone(run).ok
    facts = inspect(run)
    assert (facts.kind, facts.complete) == (f"zero{name[-1]}", True)


def rename_as_torch_saved(tag: Path, name: str) -> None:
    """Put rank 0's file in rank 1's place, saved by path as DeepSpeed does: the archive then holds its name."""
    path = tag / name.format(0)
    torch.save(torch.load(path, weights_only=False), path)
    shutil.copy(path, tag / name.format(1))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "fp32-1",
            lambda tag, other: (tag / "zero_pp_rank_0_mp_rank_00_optim_states.pt").unlink(),
            "rank 0 are missing",
        ),
        ("fp32-1", lambda tag, other: move(tag, "zero_pp_rank_1_mp_rank_00_optim_states.pt"), "written by 2 ranks"),
        ("fp32-2", lambda tag, other: move(tag, "mp_rank_00_model_states.pt"), "it is not a complete ZeRO checkpoint"),
        (
            "fp32-2",
            lambda tag, other: rename_as_torch_saved(tag, "zero_pp_rank_{}_mp_rank_00_optim_states.pt"),
            "file of another rank",
        ),
        (
            "fp32-2",
            lambda tag, other: shutil.copy(
                other / "zero_pp_rank_1_mp_rank_00_optim_states.pt", tag / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
            ),
            "two saves",
        ),
    ],
    ids=["missing", "fewer ranks", "no model", "renamed", "another save"],
)
def test_files_that_do_not_belong_together(found: Any, directory: Path, tmp_path: Path, name, change, message):
    tag = tmp_path / f"global_step{SAVED}"
    shutil.copytree(directory / name / tag.name, tag)
    (tag / "MANIFEST.json").unlink()
    change(tag, directory / "later" / f"global_step{STEPS}")
    with pytest.raises(CheckpointError, match=message):
        open_source(tag)


def move(tag: Path, name: str) -> None:
    (tag / name).rename(tag.parent / name)
