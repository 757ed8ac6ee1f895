"""Restoring ZeRO-3 states from memory: as DeepSpeed's own load does, and on any number of ranks as after a reshard."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

from checkpoints_tools.reshard.reshard import reshard
from statex_dist.checkpoint import layout
from statex_dist.checkpoint.formats.torch_archive.zip import open_archive
from statex_dist.checkpoint.manifest import FileRecord, Manifest
from statex_dist.distributed.env import read_env
from statex_dist.engine.base import keep_hyperparameters
from statex_dist.engine.snapshot import FileWriter
from statex_dist.errors import CheckpointError
from statex_dist.run_parts import build_engine, build_loader, build_model
from tests.distributed_test import run_distributed_test
from tests.engine.test_zero3_steps import configure
from tests.runs import GLA, MAMBA2, expanded, make_shards, save_model

pytestmark = pytest.mark.distributed

VARIANTS: dict[str, tuple[str, ...]] = {
    "tied, sub-groups": ("--model.path", "tied", "--engine.sub_group_size", "2000"),
    "bf16, frozen": (
        *("--engine.precision", "bf16", "--engine.param_persistence_threshold", "100"),
        *("--optimizer.train", "expanded"),
    ),
}
SLOW: dict[str, tuple[str, ...]] = {
    "bf16": ("--engine.precision", "bf16", "--engine.param_persistence_threshold", "100"),
    "offloaded": ("--engine.offload_optimizer", "cpu", "--engine.offload_parameters", "cpu"),
}


def start(directory: Path, variant: str) -> tuple[Any, Any]:
    """Return an engine, and the batches of a run."""
    arguments = [str(directory / "tied") if word == "tied" else word for word in (VARIANTS | SLOW)[variant]]
    config = configure(directory, {}, *arguments, "--data.packs_per_step", "6")
    env = read_env()
    config.engine.join(env, {})
    model = build_model(config)
    loader = build_loader(config, config.data.open_stores(), model.config, env)
    return build_engine(config, model, env), iter(loader)


def save(engine: Any, tag: Path, per_folder: int = 256) -> None:
    """Write a checkpoint as the trainer does."""
    layout.RANKS_PER_FOLDER = per_folder
    if engine.rank == 0:
        for folder in (".", *layout.rank_folders(engine.world_size)):
            (tag / folder).mkdir(parents=True, exist_ok=True)
    engine.barrier()
    captured = engine.capture(tag, {"step": 2, "rng": {"own": torch.full((3,), engine.rank)}})
    files = [(tag / layout.placed_name(path.name, engine.world_size), content) for path, content in captured]
    writer = FileWriter(files, tag, rank=engine.rank, retries=0)
    writer.run()
    assert writer.problem is None
    records = [FileRecord(**record) for part in engine.gather(writer.records) for record in part.values()]
    names = [name for part in engine.gather(writer.records) for name in part]
    if engine.rank == 0:
        info = {"step": 2, "world_size": engine.world_size}
        Manifest(kind=engine.kind, files=dict(zip(names, records, strict=True)), info=info).write(tag)
    engine.barrier()
    layout.RANKS_PER_FOLDER = 256


def spoil(engine: Any) -> None:
    """Set everything that a load is to restore to NaN, as a start for a resume leaves it."""
    zero = engine.engine.optimizer
    with torch.no_grad():
        for tensor in (*zero.fp32_partitioned_groups_flat, *zero.fp16_partitioned_groups_flat):
            tensor.fill_(torch.nan)
        for parameter in engine.engine.module.parameters():
            parameter.ds_tensor.fill_(torch.nan)
            if parameter.numel():
                parameter.fill_(torch.nan)
        saved = engine.engine.module.state_dict()
        for name, buffer in engine.engine.module.named_buffers():
            if name in saved and buffer.is_floating_point():
                buffer.fill_(torch.nan)


def states_of(engine: Any) -> dict[str, Any]:
    """Return copies of all that a checkpoint restores."""
    ds, zero = engine.engine, engine.engine.optimizer
    parameters = dict(ds.module.named_parameters())
    return {
        "fp32": [flat.detach().clone() for flat in zero.fp32_partitioned_groups_flat],
        "lp": [flat.detach().clone() for flat in zero.fp16_partitioned_groups_flat],
        "optimizer": [
            {key: torch.as_tensor(value).clone() for key, value in zero.optimizer.state[flat].items()}
            for flat in zero.fp32_partitioned_groups_flat
        ],
        "partitions": {name: p.ds_tensor.detach().clone() for name, p in parameters.items()},
        "persistent": {name: p.detach().clone() for name, p in parameters.items() if p.ds_persist},
        "buffers": {name: buffer.clone() for name, buffer in ds.module.named_buffers()},
        "counters": [ds.global_steps, ds.global_samples, ds.skipped_steps, ds.loaded_checkpoint_dp_world_size],
        "schedule": engine.schedule.state_dict(),
        "settings": [{k: v for k, v in group.items() if k != "params"} for group in engine.optimizer.param_groups],
        "rates": engine.saved_rates,
    }


def flattened(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return the values of nested containers by their paths, tensors as bytes."""
    if isinstance(value, torch.Tensor):
        data = value.detach().reshape(-1).view(torch.uint8).numpy().tobytes()
        return {prefix: (str(value.dtype), tuple(value.shape), xxhash.xxh3_128(data).hexdigest())}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else None
    if items is None:
        return {prefix: value}
    return {path: v for key, item in items for path, v in flattened(item, f"{prefix}/{key}").items()}


def train(engine: Any, batches: Any, number: int) -> list[float]:
    losses = []
    for index in range(number):
        losses.append(engine.forward_backward(next(batches)))
        engine.step(skip=number == 3 and index == 1)
    return losses


def compare(rank: int, directory: Path, variant: str) -> dict[str, Any]:
    """Save a run, and continue it in three ways: as it is, from our load and from DeepSpeed's."""
    engine, batches = start(directory, variant)
    train(engine, batches, 3)
    tag = directory / "saved" / variant / "global_step3"
    save(engine, tag)
    save(engine, directory / "saved" / variant / "folders", per_folder=1)
    found: dict[str, Any] = {"continued": {"losses": train(engine, batches, 2)}}
    engine.engine.destroy()
    for way in ("ours", "DeepSpeed's"):
        engine, batches = start(directory, variant)
        for _ in range(3):
            next(batches)
        if way == "ours":
            spoil(engine)
            client = engine.load(tag, engine.read(tag, Manifest.read(tag)))
            folders = tag.parent / "folders"
            again = engine.read(folders, Manifest.read(folders))
            found["folders"] = flattened(vars_of(again)) == flattened(vars_of(engine.read(tag, Manifest.read(tag))))
        else:
            with keep_hyperparameters(engine.optimizer, engine.schedule) as engine.saved_rates:
                loaded, client = engine.engine.load_checkpoint(str(tag.parent), tag=tag.name)
            assert loaded is not None
        states = flattened(states_of(engine))
        found[way] = {
            "states": states,
            "client": sorted(client),
            "rng": client["rng"]["own"].tolist(),
            "losses": train(engine, batches, 2),
        }
        engine.engine.destroy()
    return found


def read_all(rank: int, directory: Path, sources: dict[str, dict[str, Path]]) -> dict[str, Any]:
    """Read each variant's pieces for this number of ranks, and its resharded copy; of damaged ones return the error."""
    found: dict[str, Any] = {}
    for variant, source in sources.items():
        engine, _ = start(directory, variant)
        read = {}
        for name, tag in source.items():
            try:
                read[name] = flattened(vars_of(engine.read(tag, Manifest.read(tag))))
            except CheckpointError as error:
                read[name] = str(error)
        found[variant] = read
        engine.engine.destroy()
    return found


def vars_of(states: Any) -> dict[str, Any]:
    return {name: getattr(states, name) for name in ("model", "flat", "states", "world_size")}


def compare_all(rank: int, directory: Path, variants: list[str]) -> dict[str, Any]:
    return {variant: compare(rank, directory, variant) for variant in variants}


def save_one(rank: int, directory: Path, variant: str) -> None:
    """Save a run of one rank."""
    engine, batches = start(directory, variant)
    train(engine, batches, 1)
    save(engine, directory / "saved" / "of one" / "global_step1")
    engine.engine.destroy()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("loading")
    make_shards(directory / "data")
    save_model(expanded(GLA), directory / "model")
    save_model(expanded(MAMBA2), directory / "tied")
    return directory


@pytest.fixture(scope="module")
def compared(directory: Path) -> list[dict[str, Any]]:
    return run_distributed_test(compare_all, 2, directory, list(VARIANTS), group=False)


@pytest.fixture(scope="module")
def more(directory: Path) -> list[dict[str, Any]]:
    return run_distributed_test(compare_all, 2, directory, list(SLOW), group=False)


@pytest.mark.slow
@pytest.mark.parametrize("variant", SLOW)
def test_what_is_loaded_of_other_runs_is_what_deepspeed_loads(more: list[dict[str, Any]], variant: str):
    assert_same(more, variant)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_loaded_is_what_deepspeed_loads(compared: list[dict[str, Any]], variant: str):
    assert_same(compared, variant)


def assert_same(compared: list[dict[str, Any]], variant: str) -> None:
    for rank, of_rank in enumerate(compared):
        found = of_rank[variant]
        ours, theirs = found["ours"], found["DeepSpeed's"]
        differing = [path for path in theirs["states"] if ours["states"].get(path) != theirs["states"][path]]
        assert not differing
        assert ours["states"].keys() == theirs["states"].keys()
        assert ours["client"] == theirs["client"]
        assert ours["rng"] == theirs["rng"] == [rank] * 3
        assert ours["losses"] == theirs["losses"] == found["continued"]["losses"]
        assert found["folders"], "files in folders hold the same"
        counters = {path: value for path, value in ours["states"].items() if path.startswith("/counters")}
        assert list(counters.values())[2] == 1, "a step was skipped"


def resharded(tag: Path, world_size: int) -> Path:
    """Return a copy of a checkpoint for another number of ranks, made offline."""
    target = tag.parent / f"offline{world_size}"
    reshard(tag, target, to="zero3", world_size=world_size)
    return next(target.glob("global_step*"))


def damaged(tag: Path, pattern: str) -> Path:
    """Return a copy of a checkpoint with a flipped bit in the last storage of a file: it may be padding."""
    copy = tag.with_name(f"flipped-{len(list(tag.parent.iterdir()))}")
    shutil.copytree(tag, copy)
    path = next(copy.glob(pattern))
    entry = max(open_archive(path).entries.items(), key=lambda item: item[1].offset * item[0].startswith("data/"))[1]
    data = bytearray(path.read_bytes())
    data[entry.offset + entry.size - 1] ^= 1
    path.write_bytes(data)
    return copy


@pytest.mark.parametrize("world_size", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_another_number_of_ranks_reads_what_reshard_would_write(
    directory: Path, compared: list[dict[str, Any]], world_size: int
):
    sources = {
        variant: {"pieces": tag, "offline": resharded(tag, world_size)}
        for variant in VARIANTS
        if (tag := directory / "saved" / variant / "global_step3")
    }
    some = sources["bf16, frozen"]
    some["folders"] = some["pieces"].with_name("folders")
    for number, pattern in enumerate(("*rank_1_*_optim_states.pt", "*rank_0_*_model_states.pt")):
        some[f"damaged {number}"] = damaged(some["pieces"], pattern)
    if world_size > 1:
        run_distributed_test(save_one, 1, directory, "bf16, frozen", group=False)
        some["pieces of one"] = directory / "saved" / "of one" / "global_step1"
        some["offline of one"] = resharded(some["pieces of one"], world_size)
    ranks = run_distributed_test(read_all, world_size, directory, sources, group=False)
    for found in ranks:
        for variant, read in found.items():
            assert differing(read["pieces"], read["offline"]) == [], variant
        some = found["bf16, frozen"]
        assert differing(some["folders"], some["pieces"]) == []
        assert differing(some.get("pieces of one", {}), some.get("offline of one", {})) == []
    for number in (0, 1):
        problems = [found["bf16, frozen"][f"damaged {number}"] for found in ranks]
        assert any(isinstance(problem, str) and "damaged" in problem for problem in problems)


def differing(ours: Any, theirs: Any) -> list[str]:
    """Return the paths at which two flattened states differ, but for the numbers of ranks and the names of groups."""
    left_out = ("/world_size", "/model/dp_world_size", "/model/param_shapes", "/model/shared_params")
    paths = [path for path in sorted({*ours, *theirs}) if not path.startswith(left_out)]
    return [path for path in paths if ours.get(path) != theirs.get(path)]
