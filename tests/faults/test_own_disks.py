"""Runs whose directory lies on each host's own disk: killed between two renames, and without one of the hosts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from statex_dist.checkpoint.layout import complete_tags
from statex_dist.checkpoint.manifest import Manifest
from statex_dist.train.metrics import read_metrics
from tests.faults.test_shared_dir import start
from tests.runs import GLA, losses, make_shards, run_training, write_run

pytestmark = pytest.mark.distributed

STEPS = 6


def write_config(directory: Path, *, neighbor_copy: bool, **train: int) -> Path:
    """Return a run whose directory is relative: each rank is started in a directory of its own."""
    for rank in (0, 1):
        (directory / f"host{rank}").mkdir(exist_ok=True)
    shards = directory / "data" / "shards"
    settings = {"num_steps": STEPS, "save_every": 2, "keep_last": 3, "shared_run_dir": False}
    return write_run(
        directory / "run.yaml",
        run_dir="run",
        model={"config": {**GLA, "num_hidden_layers": 1}},
        data={"path": str(shards if shards.exists() else make_shards(directory / "data"))},
        schedule={"name": "constant"},
        train={**settings, "neighbor_copy": neighbor_copy, **train},
    )


def tags(directory: Path, host: int) -> list[str]:
    return complete_tags(directory / f"host{host}" / "run" / "checkpoints")


def rank_files(directory: Path, host: int, tag: str) -> set[int]:
    """Return the ranks whose files a host has of a checkpoint, every file of which is verified."""
    checkpoint = directory / f"host{host}" / "run" / "checkpoints" / tag
    manifest = Manifest.read(checkpoint)
    manifest.verify(checkpoint)
    assert {name for name in manifest.files if not name.endswith(".pt")} >= {"model/config.json", "training.json"}
    return {rank for rank in (0, 1) if any(f"rank_{rank}_" in name for name in manifest.files)}


def test_a_host_that_is_lost_between_two_renames_is_replaced(tmp_path: Path):
    """Rank 1 dies before its rename of step 4, which rank 0 makes; then its whole disk is gone."""
    config = write_config(tmp_path, neighbor_copy=True)
    fault = {"point": "before the rename", "rank": 1, "call": 2}
    result = start(config, STATEX_FAULTS=json.dumps([fault]))
    assert (tmp_path / "0").exists(), "it has not happened"
    assert result.returncode != 0
    assert tags(tmp_path, 1) == ["global_step2"]
    assert rank_files(tmp_path, 0, "global_step2") == {0, 1}, "its own files and the neighbour's"
    before = losses(tmp_path / "host0" / "run")
    shutil.rmtree(tmp_path / "host1" / "run")

    result = start(config)
    assert result.returncode == 0, result.stderr
    # Rank 0 has renamed its directory, and it holds what rank 1 wrote too.
    assert "resuming from run/checkpoints/global_step4" in result.stderr
    for host in (0, 1):
        assert tags(tmp_path, host)[:2] == ["global_step6", "global_step4"]
        assert rank_files(tmp_path, host, "global_step6") == {0, 1}
    after = losses(tmp_path / "host0" / "run")
    assert len(after) == STEPS
    assert after[: len(before)] == before


@pytest.mark.slow
def test_without_a_copy_a_lost_host_is_named_and_ranks_may_change_places(tmp_path: Path):
    config = write_config(tmp_path, neighbor_copy=False)
    reference = write_run(
        tmp_path / "reference.yaml",
        model={"config": {**GLA, "num_hidden_layers": 1}},
        data={"path": str(tmp_path / "data" / "shards")},
        schedule={"name": "constant"},
        train={"num_steps": 8},
    )
    assert run_training(2, "--config", str(reference)).returncode == 0
    fault = {"point": "before the rename", "rank": 0, "call": 2}
    assert start(config, STATEX_FAULTS=json.dumps([fault])).returncode != 0
    assert (tags(tmp_path, 0), tags(tmp_path, 1)[-1]) == (["global_step2"], "global_step2")
    # The hosts come in another order: each needs the other's files.
    for old, new in (("host0", "other"), ("host1", "host0"), ("other", "host1")):
        (tmp_path / old).rename(tmp_path / new)
    (tmp_path / "host1/run/metrics.jsonl").rename(tmp_path / "host0/run/metrics.jsonl")
    result = start(config)
    assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "host0" / "run") == losses(tmp_path / "reference")[:STEPS]
    assert [rank_files(tmp_path, host, "global_step6") for host in (0, 1)] == [{0}, {1}]

    # Since the change of places this one is whole on each of them.
    shutil.rmtree(tmp_path / "host0" / "run" / "checkpoints" / "global_step2")
    lost = tmp_path / "host1" / "run"
    lost.rename(tmp_path / "away")
    more = write_config(tmp_path, neighbor_copy=False, num_steps=8)
    result = start(more)
    assert result.returncode != 0
    assert "no checkpoint has the files of all ranks" in result.stderr
    assert "lacks the files of host " in result.stderr
    assert "(ranks 1)" in result.stderr
    shutil.rmtree(lost, ignore_errors=True)
    (tmp_path / "away").rename(lost)
    assert start(more).returncode == 0
    assert losses(tmp_path / "host0" / "run") == losses(tmp_path / "reference")


@pytest.mark.slow
def test_the_host_that_is_left_goes_on_alone_with_its_neighbours_files(tmp_path: Path):
    config = write_config(tmp_path, neighbor_copy=True, num_steps=4)
    assert start(config).returncode == 0
    run = tmp_path / "host0" / "run"
    for tag in complete_tags(run / "checkpoints"):
        assert rank_files(tmp_path, 0, tag) == {0, 1}
    result = run_training(
        1, "--config", str(config), "--run_dir", str(run), "--train.num_steps", "6", "--train.shared_run_dir", "false"
    )
    assert result.returncode == 0, result.stderr
    assert [record["step"] for record in read_metrics(run)] == list(range(1, 7))
