"""The sharded start of ZeRO-3 on real ranks: the same training bit for bit, no broadcasts, values read by ranges."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from statex_dist.checkpoint.manifest import Manifest
from statex_dist.distributed.env import read_env
from statex_dist.distributed.error_sync import OtherRankError
from statex_dist.errors import CheckpointError, ConfigError
from statex_dist.models.build import build_lm
from statex_dist.models.hf import from_pretrained
from statex_dist.models.registry import config_from_dict, read_config
from statex_dist.models.values import DrawnValues, StoredValues
from statex_dist.run_config import RunConfig
from statex_dist.run_parts import build_engine, build_loader, build_model, open_values
from tests.checkpoints_tools.builders import run_expand
from tests.distributed_test import run_distributed_test
from tests.engine.test_loading import save
from tests.engine.test_zero3_steps import configure
from tests.models.hybrid.hosts import HOSTS, save_host
from tests.runs import GLA, MAMBA2, OTHERS, expanded, make_shards, save_model

RANKS = 3  # divides none of the sizes: partitions have padding
CASES: dict[str, tuple[str, ...]] = {
    "bf16": (
        *("--engine.precision", "bf16", "--engine.param_persistence_threshold", "100000"),
        *("--optimizer.lr_factors.mix", "3.0"),
    ),
    "offloaded": (
        *("--engine.offload_optimizer", "cpu", "--engine.offload_parameters", "cpu"),
        *("--optimizer.freeze", "[layers.0]", "--engine.segment_tokens", "50"),
    ),
    "drawn": (),
}


def configured(directory: Path, case: str) -> RunConfig:
    """Return the configuration of a case; the drawn model is a Mamba2 with a tied head."""
    arguments = CASES[case]
    if case == "drawn":
        config = configure(directory, {}, *arguments)
        config.model.path, config.model.config = None, MAMBA2
    else:
        config = configure(directory, {}, *arguments)
    config.data.packs_per_step = RANKS
    return config


def run_steps(config: RunConfig, tag: Path, *, sharded: bool, resumes: bool = False) -> dict[str, Any]:
    """Run two steps; return loss and saved tensors of each, and the broadcasts of the start.

    Args:
        config: The run.
        tag: Where the sharded start saves after the first step, and where a resuming one begins, with the second.
        sharded: Whether the start is sharded.
        resumes: Whether it resumes.
    """
    broadcasts = 0

    def counted(*arguments: Any, _call: Any = dist.broadcast, **options: Any) -> Any:
        nonlocal broadcasts
        broadcasts += 1
        return _call(*arguments, **options)

    env = read_env()
    values = open_values(config) if sharded else None
    model = build_model(config, values)
    loader = build_loader(config, config.data.open_stores(), model.config, env)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "broadcast", counted)
        engine = build_engine(config, model, env, values, resumes=resumes)
    if resumes:
        engine.load(tag, engine.read(tag, Manifest.read(tag)))
    batches, found = iter(loader), []
    for half in range(2):
        losses, packs = [], next(batches)
        if half or not resumes:
            losses.append(engine.forward_backward(packs))
            engine.step()
        files = {path.name: content for path, content in engine.capture(tag, {})}
        found.append({"losses": losses, "tensors": dict(tensors_of(files, ""))})
        if sharded and not half and not resumes:
            save(engine, tag)
    batches.close()
    engine.engine.destroy()  # the process group stays: DeepSpeed remembers its groups
    return {"first": found[0], "second": found[1], "broadcasts": broadcasts}


def tensors_of(value: Any, path: str) -> Any:
    """Yield every tensor in nested containers with its path."""
    if isinstance(value, torch.Tensor):
        yield path, value.detach().clone()
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from tensors_of(item, f"{path}/{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from tensors_of(item, f"{path}/{index}")


def differing(whole: dict[str, torch.Tensor], sharded: dict[str, torch.Tensor], *, rank: int, ranks: int) -> list[str]:
    """Return the tensors that differ; the last rank's partitions end with padding, which a whole start leaves unset."""
    found = [f"{name} is only in one" for name in whole.keys() ^ sharded.keys()]
    for name in whole.keys() & sharded.keys():
        mine, other = sharded[name], whole[name]
        if rank == ranks - 1 and re.search("flat_groups|frozen_param_fragments", name):
            assert torch.isfinite(mine).all()
            unlike = (mine != other).nonzero().flatten()
            if (mine[unlike] != 0).any():
                found.append(name)
        elif not torch.equal(mine, other):
            found.append(name)
    return found


def work(rank: int, directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for case in CASES:
        config, tag = configured(directory, case), directory / f"sharded-{case}"
        whole = run_steps(config, directory / f"whole-{case}", sharded=False)
        sharded = run_steps(config, tag, sharded=True)
        found[case] = {
            **compared(whole, sharded, "second", rank=rank, ranks=RANKS),
            "tensors": len(sharded["second"]["tensors"]),
            "broadcasts": (whole["broadcasts"], sharded["broadcasts"]),
        }
        if case != "drawn":
            resumed = run_steps(config, tag, sharded=True, resumes=True)
            found[case]["resumed"] = compared(whole, resumed, "second", rank=rank, ranks=RANKS)
    found["refused"] = refusal_of_damage(directory)
    return found


def compared(whole: Any, other: Any, step: str, *, rank: int, ranks: int) -> dict[str, Any]:
    """Return the loss of a step in both ways, and the tensors that differ after it."""
    return {
        "losses": (whole[step]["losses"], other[step]["losses"]),
        "differing": differing(whole[step]["tensors"], other[step]["tensors"], rank=rank, ranks=ranks),
    }


def refusal_of_damage(directory: Path) -> str:
    """Return the class of error with which a start from a damaged model ends on this rank."""
    config = configured(directory, "bf16")
    config.model.path = str(directory / "damaged")
    values = open_values(config)
    try:
        build_engine(config, build_model(config, values), read_env(), values)
    except (CheckpointError, OtherRankError) as error:
        return type(error).__name__
    return ""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("start")
    make_shards(directory / "data")
    save_model(expanded(GLA), directory / "model")
    save_model(config_from_dict(GLA), directory / "plain")
    run_expand(directory / "plain", directory / "damaged", layers="0", factor=2, op="merge_heads", init="reinit")
    flip_byte(directory / "damaged" / "model.safetensors")
    return directory


def flip_byte(path: Path) -> None:
    """Change one byte in the middle of a file's values."""
    content = bytearray(path.read_bytes())
    content[-(len(content) // 2)] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def found(directory: Path) -> list[dict[str, Any]]:
    return run_distributed_test(work, RANKS, directory, group=False)


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_training_equals_that_of_a_whole_start_bit_for_bit(found, case: str):
    for rank in found:
        whole, sharded = rank[case]["losses"]
        assert sharded == whole
        assert rank[case]["differing"] == []
        assert rank[case]["tensors"] > 10
        assert rank[case]["broadcasts"][1] == 0 < rank[case]["broadcasts"][0]


@pytest.mark.distributed
@pytest.mark.parametrize("case", ["bf16", "offloaded"])
def test_a_checkpoint_sets_every_value_of_a_start_without_values(found, case: str):
    for rank in found:
        whole, resumed = rank[case]["resumed"]["losses"]
        assert resumed == whole
        assert rank[case]["resumed"]["differing"] == []


@pytest.mark.distributed
def test_a_damaged_tensor_is_found_by_one_rank_and_stops_all(found):
    assert sorted(rank["refused"] for rank in found) == ["CheckpointError", *["OtherRankError"] * (RANKS - 1)]


@pytest.fixture(scope="module")
def stored(directory: Path) -> tuple[StoredValues, dict[str, torch.Tensor]]:
    whole = from_pretrained(directory / "model", dtype=torch.float32)
    return StoredValues(directory / "model", dtype=torch.float32), whole.stored_tensors()


@given(data=st.data())
def test_stored_ranges_are_those_of_the_whole_tensor(stored, data):
    values, whole = stored
    name = data.draw(st.sampled_from(sorted(whole)))
    check_range(values, name, whole[name], data)


@pytest.fixture(scope="module")
def drawn() -> dict[str, tuple[DrawnValues, dict[str, torch.Tensor]]]:
    found = {}
    for name, settings in {"gla": GLA, "mamba2": MAMBA2, **OTHERS}.items():
        model = build_lm(config_from_dict(settings))
        model.init_parameters(3)
        values = DrawnValues(config_from_dict(settings), dtype=torch.float32, seed=3)
        found[name] = values, dict(model.named_parameters())
    return found


@given(data=st.data())
def test_drawn_ranges_are_those_of_the_whole_tensor(drawn, data):
    values, whole = drawn[data.draw(st.sampled_from(sorted(drawn)))]
    name = data.draw(st.sampled_from(sorted(whole)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("statex_dist.models.values._DRAWN_AT_ONCE", data.draw(st.sampled_from([7, 64, 1 << 20])))
        check_range(values, name, whole[name].detach(), data)


def check_range(values: StoredValues | DrawnValues, name: str, whole: torch.Tensor, data: st.DataObject) -> None:
    """Compare a random range of a tensor with the whole one's."""
    start = data.draw(st.integers(0, whole.numel()))
    stop = data.draw(st.integers(start, whole.numel()))
    flat, place = whole.reshape(-1), start
    for first, piece in values.read(name, start, stop):
        assert first == place
        assert torch.equal(piece, flat[first : first + len(piece)])
        place += len(piece)
    assert place == stop


def test_hybrids_refuse_to_be_drawn(tmp_path: Path):
    save_host("bamba", tmp_path / "host")
    with pytest.raises(ConfigError):
        DrawnValues(read_config(tmp_path / "host"), dtype=torch.float32, seed=0)


def work_on_hosts(rank: int, directory: Path) -> dict[str, Any]:
    found = {}
    for kind in HOSTS:
        config = configure(directory, {}, "--model.path", str(directory / kind))
        config.data.packs_per_step = 2
        whole = run_steps(config, directory / f"whole-{kind}", sharded=False)
        sharded = run_steps(config, directory / f"sharded-{kind}", sharded=True)
        found[kind] = compared(whole, sharded, "second", rank=rank, ranks=2)
    return found


@pytest.mark.slow
@pytest.mark.distributed
def test_hosted_hybrids_start_bit_for_bit(tmp_path: Path):
    make_shards(tmp_path / "data", num_documents=12)
    for kind in HOSTS:
        save_host(kind, tmp_path / kind, vocab_size=258, eos_token_id=256, pad_token_id=257)
    for rank in run_distributed_test(work_on_hosts, 2, tmp_path, group=False):
        for kind, result in rank.items():
            whole, sharded = result["losses"]
            assert (kind, sharded, result["differing"]) == (kind, whole, [])
