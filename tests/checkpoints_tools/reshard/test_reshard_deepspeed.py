"""Our reader against DeepSpeed's own converter, on files that DeepSpeed wrote."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from checkpoints_tools.io.target_writer import WriteOptions
from checkpoints_tools.reshard.reshard import reshard
from checkpoints_tools.verify.inspect import inspect
from statex_dist.checkpoint.manifest import Manifest, record_file
from statex_dist.errors import CheckpointError
from statex_dist.models.source import open_source
from tests.checkpoints_tools.builders import load_all
from tests.raising import raises

pytestmark = pytest.mark.distributed


@pytest.fixture(params=["fp32", "bf16"])
def run(request, deepspeed_run) -> Path:
    return deepspeed_run / request.param


@pytest.fixture
def damaged(deepspeed_run, tmp_path) -> Path:
    """A copy of the bf16 tag, to damage."""
    shutil.copytree(deepspeed_run / "bf16", tmp_path / "copy")
    return tmp_path / "copy" / "global_step2"


def converted(run: Path) -> dict[str, torch.Tensor]:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    return get_fp32_state_dict_from_zero_checkpoint(str(run))


def test_same_tensors_as_deepspeed(run, tmp_path):
    expected = converted(run)
    assert len(expected) == 11
    source = open_source(run)
    assert source.keys() == list(expected)
    assert source.aliases == {"head.weight": "embed.weight"}
    assert source.facts.info["step"] == 2
    reshard(run, tmp_path / "out")
    written = load_all(tmp_path / "out")
    assert set(written) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(written[name], tensor), name
        assert written[name].dtype == tensor.dtype
    assert not (tmp_path / "out/config.json").exists()


@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_same_rounding_as_deepspeed(run, tmp_path, name, dtype):
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_state_dict

    convert_zero_checkpoint_to_state_dict(str(run), str(tmp_path / "theirs"), dtype=dtype)
    theirs = torch.load(tmp_path / "theirs/pytorch_model.bin", weights_only=True)
    reshard(run, tmp_path / "ours", dtype=name, options=WriteOptions(max_shard_size=200))
    ours = load_all(tmp_path / "ours")
    assert set(ours) == set(theirs)
    for key, tensor in theirs.items():
        assert torch.equal(ours[key], tensor), key
        assert ours[key].dtype == tensor.dtype


def test_a_tag_can_be_named(run):
    assert open_source(run / "global_step2").facts.path == run / "global_step2"
    facts = inspect(run)
    assert (facts.kind, facts.world_size, facts.step, facts.complete) == ("zero3", 2, 2, True)
    assert facts.manifest == "no MANIFEST.json"


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("*_1_*optim*", "optim states.*rank 1"),
        ("*_0_*model*", "model states.*rank 0"),
        ("*_1_*", "2 ranks; .* 1$"),
    ],
)
def test_missing_files(damaged, pattern, message):
    for path in damaged.glob(pattern):
        path.unlink()
    with pytest.raises(CheckpointError, match=message):
        open_source(damaged)


def test_extra_rank(damaged):
    for path in damaged.glob("*_1_*"):
        shutil.copy(path, damaged / path.name.replace("rank_1_", "rank_2_"))
    with pytest.raises(CheckpointError, match=r"2 ranks; .* 3$"):
        open_source(damaged)
    shutil.copy(next(damaged.glob("bf16*_1_*")), damaged / "zero_pp_rank_1_mp_rank_00_optim_states.pt")
    with raises(CheckpointError, "two files", "rank 1"):
        open_source(damaged)


@pytest.mark.parametrize("kind", ["model", "optim"])
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_truncated_file(damaged, tmp_path, kind, keep):
    path = next(damaged.glob(f"*_1_*{kind}*"))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(CheckpointError, match=f"{path.name} is truncated"):
        reshard(damaged, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".tmp*"))


def test_wrong_arithmetic(damaged):
    path = next(damaged.glob("*_0_*optim*"))
    from deepspeed.runtime.zero.config import ZeroStageEnum

    content = torch.load(path, weights_only=False)  # our own file
    states = content["optimizer_state_dict"]
    states["fp32_flat_groups"][0] = states["fp32_flat_groups"][0][:-1].clone()
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="'exp_avg'"):
        open_source(damaged)
    for name in ("exp_avg", "exp_avg_sq"):
        state = states["optimizer_state_dict"]["state"][0]
        state[name] = state[name][:-1].clone()
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"rank_1_.*flat groups"):
        open_source(damaged)
    torch.save(content, next(damaged.glob("*_1_*optim*")))
    with pytest.raises(CheckpointError, match="the flat groups hold"):
        open_source(damaged)
    content["optimizer_state_dict"]["zero_stage"] = ZeroStageEnum(2)
    torch.save(content, path)
    with raises(CheckpointError, "stage 2", "stage 3"):
        open_source(damaged)


def test_files_of_two_saves(damaged):
    path = next(damaged.glob("*_1_*model*"))
    content = torch.load(path, weights_only=True)
    torch.save({**content, "global_steps": 7}, path)
    with pytest.raises(CheckpointError, match="two saves"):
        open_source(damaged)


class Evil:
    def __reduce__(self):
        return print, ("this must never be printed",)


def test_hostile_pickle_is_refused(damaged, capfd):
    path = next(damaged.glob("*_1_*model*"))
    torch.save({"param_shapes": [], "module": {}, "x": Evil()}, path)
    with pytest.raises(CheckpointError, match=rf"{path.name} .*\.print"):
        open_source(damaged)
    assert "never" not in capfd.readouterr().out


def test_manifest_catches_a_flipped_byte(damaged, tmp_path):
    files = {path.name: record_file(path) for path in damaged.iterdir()}
    Manifest(kind="zero3", files=files, info={"step": 2}).write(damaged)
    assert open_source(damaged.parent).facts.verified
    assert json.loads((damaged / "MANIFEST.json").read_text())["kind"] == "zero3"
    path = next(damaged.glob("*_1_*optim*"))
    place = open_source(damaged).pieces("up.weight")[1]
    content = bytearray(path.read_bytes())
    content[place.offset + 5] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{path.name} .*CRC-32 .*'data/"):
        reshard(damaged.parent, tmp_path / "out")
