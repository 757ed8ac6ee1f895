"""Other numbers of ranks: bit for bit against the arithmetic, and with real DeepSpeed going on from the result."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.synthetic_zero3 import write_zero3
from checkpoints_tools.formats.zero3.optimizer_states import batch_proposal
from checkpoints_tools.reshard.reshard import reshard
from checkpoints_tools.verify.verify import verify_alone, verify_same
from statex_dist.checkpoint.formats.zero3.layout import sub_groups
from statex_dist.checkpoint.manifest import Manifest
from statex_dist.errors import CheckpointError
from statex_dist.models.source import open_source
from tests.checkpoints_tools.builders import GLA, load_all, random_tensors, write_model


def files_of(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(directory.rglob("*.pt"))}


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(1, 9), max_size=3).map(tuple), min_size=1, max_size=6),
    worlds=st.tuples(*[st.integers(1, 7)] * 3),
    sub_group_size=st.integers(1, 200),
)
def test_any_ranks_and_back_is_the_identity(tmp_path_factory, shapes, worlds, sub_group_size):
    root = tmp_path_factory.mktemp("worlds")
    tensors = {f"p{i}": torch.randn(shape) for i, shape in enumerate(shapes)}
    write_zero3(root / "0/global_step1", tensors, worlds[0], sub_group_size=sub_group_size)
    for index, world_size in enumerate((worlds[1], worlds[2], worlds[1])):
        reshard(root / f"{index}", root / f"{index + 1}", to="zero3", world_size=world_size)
    reshard(root / "3", root / "hf")
    assert verify_same(root / "0", root / "3").ok
    assert load_all(root / "hf").keys() == tensors.keys()
    assert all(torch.equal(load_all(root / "hf")[name], tensor) for name, tensor in tensors.items())
    # The same number of ranks gives the same bytes, whatever lay between.
    assert files_of(root / "1") == files_of(root / "3")
    for state, values in (("exp_avg", lambda t: t * 0.5), ("exp_avg_sq", lambda t: t * t)):
        flats = [
            torch.load(path, weights_only=True)["optimizer_state_dict"]["optimizer_state_dict"]["state"]
            for path in sorted((root / "1").rglob("*optim*"))
        ]
        total = sum(flat[state].abs().double().sum() for rank in flats for flat in rank.values())
        assert total == pytest.approx(float(sum(values(t).abs().double().sum() for t in tensors.values())), rel=1e-6)


@settings(deadline=None)
@given(
    sizes=st.lists(st.lists(st.integers(1, 300), min_size=1, max_size=8), min_size=1, max_size=3),
    world_size=st.integers(1, 9),
    limit=st.integers(1, 400),
)
def test_sub_groups_are_cut_as_deepspeed_cuts_them(sizes, world_size, limit):
    from types import SimpleNamespace

    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Stage3

    groups = [{f"{g}.{i}": (size,) for i, size in enumerate(group)} for g, group in enumerate(sizes)]
    for group, cut in zip(groups, sub_groups(groups, world_size, limit), strict=True):
        params = [
            SimpleNamespace(name=name, partition_numel=lambda n=shape[0]: -(-n // world_size))
            for name, shape in group.items()
        ]
        theirs = Stage3._create_fp16_sub_groups(SimpleNamespace(sub_group_size=limit), params)
        assert cut == [[param.name for param in sub_group] for sub_group in theirs]


@pytest.mark.parametrize(
    ("config", "worlds", "expected"),
    [
        ({"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3}, (4, 2), (24, 2, 6, True)),
        ({"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3}, (4, 8), (24, 1, 3, True)),
        ({"train_micro_batch_size_per_gpu": 4}, (2, 1), (8, 4, 2, True)),
        ({"train_micro_batch_size_per_gpu": 4, "train_batch_size": 32}, (4, 8), (32, 4, 1, True)),
        ({"gradient_accumulation_steps": 2, "train_batch_size": 32}, (4, 2), (32, 4, 4, True)),
        ({"train_micro_batch_size_per_gpu": 2}, (4, 3), (8, 2, 1, False)),
        ({"train_micro_batch_size_per_gpu": 1}, (2, 5), (2, 1, 1, False)),
    ],
)
def test_the_global_batch_is_kept_where_it_can_be(config, worlds, expected):
    found = batch_proposal(config, *worlds)
    assert found is not None
    assert tuple(found.values()) == expected
    total, micro, steps, kept = expected
    assert kept is (micro * steps * worlds[1] == total)


def test_settings_that_do_not_say_the_batch():
    assert batch_proposal({"train_batch_size": 32}, 4, 2) is None
    assert batch_proposal({"train_micro_batch_size_per_gpu": "auto"}, 4, 2) is None


def test_a_model_becomes_a_checkpoint_to_train_from(tmp_path):
    tensors = write_model(tmp_path / "hf", {**GLA, "tie_word_embeddings": True})
    summary = reshard(tmp_path / "hf", tmp_path / "zero", to="zero3", world_size=3, dtype="bf16")
    assert summary.notes == ["no optimizer states: training begins at step 0"]
    assert len(list((tmp_path / "zero/global_step0").glob("bf16_zero_pp_rank_*_optim_states.pt"))) == 3
    reshard(tmp_path / "zero", tmp_path / "back")
    written = load_all(tmp_path / "back")
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())
    assert json.loads((tmp_path / "zero/global_step0/model/config.json").read_text())["model_type"] == "gla"


def test_order_of_parameters_must_be_known(tmp_path):
    write_model(tmp_path / "in", GLA)
    (tmp_path / "in/config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(CheckpointError, match=r"--to zero3 from hf .* 'llama'"):
        reshard(tmp_path / "in", tmp_path / "out", to="zero3", world_size=2)


def test_optimizers_that_cannot_be_cut_anew(tmp_path):
    tensors = random_tensors(GLA)
    for name, value, message in (
        ("absmax", torch.ones(7), "'absmax'"),
        ("exp_avg", torch.ones(1), None),
    ):
        tag = tmp_path / name / "global_step1"
        write_zero3(tag, tensors, 1)
        path = next(tag.glob("*optim*"))
        content = torch.load(path, weights_only=True)
        state = content["optimizer_state_dict"]["optimizer_state_dict"]["state"][0]
        state[name] = value if message else state["exp_avg"].bfloat16()
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=message or "'exp_avg' .*fp32"):
            open_source(tag.parent)


def test_ranks_at_different_steps(tmp_path):
    tag = tmp_path / "global_step1"
    write_zero3(tag, random_tensors(GLA), 2)
    path = next(tag.glob("*_1_*optim*"))
    content = torch.load(path, weights_only=True)
    content["optimizer_state_dict"]["optimizer_state_dict"]["state"][0]["step"] = torch.tensor(9.0)
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=rf"{path.name}: .*step .* two saves"):
        open_source(tag)


@pytest.mark.parametrize("kind", ["model", "optim"])
def test_swapped_rank_files_are_noticed_without_a_manifest(tmp_path, kind):
    tag = tmp_path / "global_step1"
    write_zero3(tag, random_tensors(GLA), 2)
    first, second = sorted(tag.glob(f"*{kind}*"))
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"was saved as \w+_rank_\d_\w+\.pt"):
        open_source(tag)


@pytest.mark.distributed
class TestDeepSpeedGoesOn:
    """4 -> 2 -> 3 -> 1 ranks against an uninterrupted run on 4: two groups, frozen, tied, buffers, sub-groups."""

    @pytest.fixture(scope="class")
    def chain(self, tmp_path_factory):
        root = tmp_path_factory.mktemp("chain")
        reports = {"whole": self.run(4, root / "whole", 1, 8), 4: self.run(4, root / "at4", 1, 2)}
        source, step = root / "at4", 3
        for world_size in (2, 3, 1):
            summary = reshard(source, root / f"for{world_size}", to="zero3", world_size=world_size)
            assert summary.batch["global"] == 12
            assert summary.batch["kept"]
            reports[world_size] = self.run(
                world_size, root / f"at{world_size}", step, step + 1, root / f"for{world_size}"
            )
            source, step = root / f"at{world_size}", step + 2
        return root, reports

    def run(self, world_size: int, out: Path, first: int, last: int, load: Path | None = None):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world_size)]
        script = [str(Path(__file__).parents[1] / "continue_zero3.py"), str(out), str(first), str(last)]
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            [*command, *script, *([str(load)] if load else [])],
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.partition("REPORT ")[2].splitlines()[0])

    def test_the_losses_go_on(self, chain):
        reports = chain[1]
        expected = reports["whole"]["losses"]
        found = [row for world_size in (4, 2, 3, 1) for row in reports[world_size]["losses"]]
        assert len(found) == len(expected) == 8
        # The loaded values are the same to the last bit; another number of ranks then sums gradients in another order.
        assert found[:3] == expected[:3]
        for ours, theirs in zip(found, expected, strict=True):
            values = [[float.fromhex(value) for value in row] for row in (ours, theirs)]
            assert values[0] == pytest.approx(values[1], abs=1e-5)
        means = [sum(map(float.fromhex, row)) / len(row) for row in expected]
        assert max(means) - min(means) > 0.5, "nothing was learnt, so equality would say little"

    @pytest.mark.parametrize(("world_size", "steps"), [(2, 2), (3, 4), (1, 6)])
    def test_everything_came_back(self, chain, world_size, steps):
        rate = 1 / (1 + steps)
        for rank, loaded in enumerate(chain[1][world_size]["loaded"]):
            assert loaded["note"] == "hello"
            assert (loaded["global_steps"], loaded["last_epoch"], loaded["steps"]) == (steps, steps, [steps])
            assert loaded["groups"] == [
                [pytest.approx(1e-2 * rate), 0.1],
                [pytest.approx(1e-2 * rate), 0.2],
                [pytest.approx(5e-3 * rate), 0.0],
            ]
            assert loaded["offset"][0] == -1.0, "buffers are restored"
            assert loaded["turned"] == torch.arange(12.0).view(3, 4).t().tolist()
            # A rank has its own state of the generator; ranks beyond those that wrote get the first ones' again.
            wrote = {2: 4, 3: 2, 1: 3}[world_size]
            assert (loaded["rng"], loaded["rank_of_rng"]) == (rank % wrote, rank % wrote)
            assert not loaded["carried"], "the lanes are others'"

    def test_every_tensor_is_the_same_on_any_number_of_ranks(self, chain):
        root = chain[0]
        for wrote, loads in (("at4", "for2"), ("at2", "for3"), ("at3", "for1")):
            verdict = verify_same(root / wrote, root / loads)
            assert verdict.ok, verdict.differences
            assert verdict.tensors == {"kept": 12, "exp_avg": 6, "exp_avg_sq": 6}
            assert verify_alone(root / loads).ok
            manifest = Manifest.read(root / loads / f"global_step{open_source(root / loads).facts.info['step']}")
            assert manifest.info["batch"]["kept"]
        summary = reshard(root / "at4", root / "again", to="zero3", world_size=2)
        assert "each rank has its own client state (mine, rng): that of ranks 0..1 is kept" in summary.notes[0]
        assert "states between packs are left out" in summary.notes[1]

    def test_deepspeeds_own_converter_reads_it(self, chain, tmp_path):
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        for directory in ("for2", "for3", "for1"):
            theirs = get_fp32_state_dict_from_zero_checkpoint(str(chain[0] / directory))
            reshard(chain[0] / directory, tmp_path / directory)
            ours = load_all(tmp_path / directory)
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
