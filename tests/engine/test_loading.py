"""Restoring ZeRO-3 states from memory: the same as DeepSpeed's own load, and on any number of ranks as after reshard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints_tools.reshard.reshard import reshard
from statex_dist.checkpoint import layout
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
    "fp32": ("--engine.sub_group_size", "4000"),
    "bf16": ("--engine.precision", "bf16", "--engine.param_persistence_threshold", "100"),
    "tied": ("--model.path", "tied"),
    "frozen": ("--engine.precision", "bf16", "--optimizer.train", "expanded"),
    "offloaded": ("--engine.offload_optimizer", "cpu", "--engine.offload_parameters", "cpu"),
}


def start(directory: Path, variant: str) -> tuple[Any, Any]:
    """Return an engine, and the batches of a run."""
    arguments = [str(directory / "tied") if word == "tied" else word for word in VARIANTS[variant]]
    config = configure(directory, {}, *arguments)
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
            (tag / folder).mkdir(exist_ok=True)
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
        return {prefix: (str(value.dtype), tuple(value.shape), value.detach().reshape(-1).view(torch.uint8).tolist())}
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


def vars_of(states: Any) -> dict[str, Any]:
    return {name: getattr(states, name) for name in ("model", "flat", "states", "world_size")}


def compare_all(rank: int, directory: Path) -> dict[str, Any]:
    return {variant: compare(rank, directory, variant) for variant in VARIANTS}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("loading")
    make_shards(directory / "data")
    save_model(expanded(GLA), directory / "model")
    save_model(expanded(MAMBA2), directory / "tied")
    for variant in VARIANTS:
        for name in ("global_step3", "folders"):
            (directory / "saved" / variant / name).mkdir(parents=True)
    return directory


@pytest.fixture(scope="module")
def compared(directory: Path) -> list[dict[str, Any]]:
    return run_distributed_test(compare_all, 2, directory, group=False)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_loaded_is_what_deepspeed_loads(compared: list[dict[str, Any]], variant: str):
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
