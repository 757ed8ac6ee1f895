"""Which checkpoint in another trainer's directory is read, on empty files of the right names."""

from pathlib import Path

import pytest

from statex_dist.checkpoint.formats.places import (
    checkpoint_inside,
    model_dir_of,
    step_of_directory,
    trainer_files,
    trainer_states,
)
from statex_dist.errors import CheckpointError


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def tracked(root: Path, text: str) -> Path:
    (root / "latest_checkpointed_iteration.txt").write_text(text)
    return root


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("checkpoint/step-9/.metadata", "checkpoint/step-10/.metadata"), "checkpoint/step-10"),
        (("checkpoint/step-9/.metadata", "checkpoint/step-10/__0_0.distcp"), "checkpoint/step-9"),
        (("step-2/.metadata",), "step-2"),
        (("checkpoint-500/latest", "checkpoint-1000/latest", "config.json"), "checkpoint-1000"),
        (("checkpoints/checkpoint_1/latest", "checkpoints/checkpoint_0/latest"), "checkpoints/checkpoint_1"),
        (("iter_0000010/.metadata", "iter_0000020/.metadata"), "iter_0000020"),
        (("pytorch_model_fsdp_0/.metadata", "optimizer_0/.metadata", "config.json"), "pytorch_model_fsdp_0"),
        (("checkpoint-7/pytorch_model_fsdp_0/.metadata",), "checkpoint-7"),
    ],
)
def test_runs(tmp_path, names, expected):
    assert checkpoint_inside(touch(tmp_path, *names)) == tmp_path / expected


@pytest.mark.parametrize("names", [(), ("config.json", "notes/step.txt"), ("step-x/.metadata",)])
def test_other_directories(tmp_path, names):
    assert checkpoint_inside(touch(tmp_path, *names)) is None


def test_megatrons_tracker_decides(tmp_path):
    touch(tmp_path, "iter_0000010/.metadata", "iter_0000020/.metadata", "release/.metadata")
    assert checkpoint_inside(tracked(tmp_path, "10\n")) == tmp_path / "iter_0000010"
    assert checkpoint_inside(tracked(tmp_path, "release")) == tmp_path / "release"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("30", "iter_0000030 .*: iter_0000010, iter_0000020"),
        ("../evil", "'../evil'"),
        ("", "''"),
        ("²", "'²'"),
        ("9" * 5000, "'9{40}'"),
        ("20", r"iter_0000020.* \.metadata"),
    ],
)
def test_a_wrong_tracker(tmp_path, text, message):
    touch(tmp_path, "iter_0000010/.metadata", "iter_0000020/__0_0.distcp")
    with pytest.raises(CheckpointError, match=message) as error:
        checkpoint_inside(tracked(tmp_path, text))
    assert len(str(error.value)) <= 400


@pytest.mark.parametrize("where", ["", "iter_0000010/"])
@pytest.mark.parametrize("with_tracker", [True, False])
def test_old_megatron_formats_are_named(tmp_path, where, with_tracker):
    touch(tmp_path, f"{where}mp_rank_00/model_optim_rng.pt")
    if with_tracker:
        tracked(tmp_path, "10")
    with pytest.raises(CheckpointError, match="torch_dist"):
        checkpoint_inside(tmp_path)


def test_no_complete_checkpoint(tmp_path):
    touch(tmp_path, "checkpoint/step-1/__0_0.distcp", "checkpoint/step-2/__0_0.distcp")
    with pytest.raises(CheckpointError, match="step-1, step-2"):
        checkpoint_inside(tmp_path)


@pytest.mark.parametrize(
    ("weights", "config", "found"),
    [
        ("global_step2", "global_step2/model", True),
        ("checkpoint-2/global_step2", "checkpoint-2", True),
        ("checkpoint/step-3", "", True),
        ("checkpoint/step-3", "checkpoint/step-3", True),
        ("checkpoint-7/pytorch_model_fsdp_0", "checkpoint-7", True),
        ("checkpoint-7/pytorch_model_fsdp_0", "", True),
        ("iter_0000010", "", True),
        ("a/b/c", "a", False),
    ],
)
def test_config(tmp_path, weights, config, found):
    (tmp_path / weights).mkdir(parents=True)
    touch(tmp_path / config, "config.json")
    assert model_dir_of(tmp_path / weights) == (tmp_path / config if found else None)


def test_steps():
    assert step_of_directory(Path("run/checkpoint/step-12")) == 12
    assert step_of_directory(Path("run/iter_0000010")) == 10
    assert step_of_directory(Path("out/checkpoint-7/pytorch_model_fsdp_0")) == 7
    assert step_of_directory(Path("run/release")) is None


def test_a_config_of_the_tag_comes_first(tmp_path):
    touch(tmp_path, "checkpoint-2/config.json", "checkpoint-2/global_step2/model/config.json")
    assert model_dir_of(tmp_path / "checkpoint-2/global_step2") == tmp_path / "checkpoint-2/global_step2/model"


def test_what_trainers_leave_beside_a_model(tmp_path):
    assert trainer_files(tmp_path) == set()
    touch(tmp_path, "latest")
    assert trainer_files(tmp_path) == {"zero_to_fp32.py", "zero_to_torch.py"}
    touch(tmp_path, "checkpoint/step-1/.metadata")
    assert trainer_files(tmp_path) >= {"setup.py", "LICENSE"}


def test_states_of_trainer_and_accelerate(tmp_path):
    names = [
        "optimizer.pt",
        "optimizer.bin",
        "optimizer_1.bin",
        "random_states_0.pkl",
        "rng_state_1.pth",
        "scheduler.pt",
    ]
    touch(tmp_path, *names, "model.safetensors", "config.json", "training_args.bin", "pytorch_model.bin")
    assert trainer_states(tmp_path) == sorted(names)
