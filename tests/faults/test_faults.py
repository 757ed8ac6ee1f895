"""Real faults in real two-rank jobs: killed at every delicate moment, hung, out of disk; and brought back."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from statex_dist.checkpoint.layout import complete_tags
from statex_dist.checkpoint.manifest import Manifest
from statex_dist.train.metrics import read_metrics
from tests.runs import (
    GLA,
    REPOSITORY,
    command,
    environment,
    expanded,
    losses,
    make_shards,
    run_training,
    save_model,
    write_run,
)

pytestmark = pytest.mark.distributed

NUM_STEPS = 12


@pytest.fixture(scope="module")
def sections(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("inputs")
    return {
        "model": {"path": str(save_model(expanded(GLA), root / "model"))},
        "data": {"path": str(make_shards(root / "data"))},
        "train": {"num_steps": NUM_STEPS, "save_every": 2, "keep_last": 3},
    }


def broken(done: Path, *faults: dict[str, Any]) -> dict[str, str]:
    """Return the environment of a job in which these faults happen, one in each start."""
    done.mkdir()
    return {
        **environment(),
        "PYTHONPATH": str(Path(__file__).parent / "injected"),
        "STATEX_FAULTS": json.dumps(faults),
        "STATEX_FAULTS_DONE": str(done),
    }


def final_files(run: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint, by file and place."""
    newest = run / "checkpoints" / complete_tags(run / "checkpoints")[0]
    assert newest.name == f"global_step{NUM_STEPS}"
    Manifest.read(newest).verify(newest)
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    return get_fp32_state_dict_from_zero_checkpoint(str(newest.parent), tag=newest.name)


PICK = random.Random(7)
FAULTS = [
    {"point": "forward", "rank": PICK.randrange(2), "call": PICK.randrange(3, 8)},
    {"point": "save", "rank": 1, "call": PICK.randrange(1, 4)},
    {"point": "optimizer step", "rank": PICK.randrange(2), "call": PICK.randrange(1, 4)},
    {"point": "between rename and latest", "rank": 0, "call": 1},
    {"point": "before the manifest", "rank": PICK.randrange(2), "call": 1},
]


# Two on every change, those that strike a checkpoint as it is written; all five take minutes.
@pytest.mark.parametrize("faults", [FAULTS[1:4:2], pytest.param(FAULTS, marks=pytest.mark.slow)], ids=["two", "five"])
def test_kills_cost_no_step_no_batch_and_no_bit(tmp_path: Path, sections: dict[str, Any], faults: list[dict[str, Any]]):
    train = {**sections["train"], "save_async": True}
    undisturbed = write_run(tmp_path / "undisturbed.yaml", **{**sections, "train": train})
    assert run_training(2, "--config", str(undisturbed)).returncode == 0
    file = write_run(tmp_path / "run.yaml", **{**sections, "train": train})
    supervise = [sys.executable, str(REPOSITORY / "launch" / "supervise.py"), "--nproc", "2", "--backoff", "0.1"]
    result = subprocess.run(
        [*supervise, "--", "--config", str(file)],
        env=broken(tmp_path / "done", *faults),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    happened = sorted(path.name for path in (tmp_path / "done").iterdir())
    assert happened == [str(number) for number in range(len(faults))], "not all happened"
    assert f"attempt {len(faults) + 1}:" in result.stderr
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == list(range(1, NUM_STEPS + 1))
    assert losses(tmp_path / "run") == losses(tmp_path / "undisturbed"), "another batch, or another model"
    ours, reference = final_files(tmp_path / "run"), final_files(tmp_path / "undisturbed")
    assert all(torch.equal(tensor, ours[name]) for name, tensor in reference.items())
    assert not list((tmp_path / "run" / "checkpoints").glob(".tmp-*"))
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == f"global_step{NUM_STEPS}"


@pytest.mark.slow
def test_torchrun_restarts_the_ranks_of_one_host(tmp_path: Path, sections: dict[str, Any]):
    """Its store is kept over the restarts, with the addresses of the ranks that are gone."""
    files = [write_run(tmp_path / f"{name}.yaml", **sections) for name in ("undisturbed", "run")]
    assert run_training(2, "--config", str(files[0])).returncode == 0
    launcher = command(2, "--config", str(files[1]))
    place = launcher.index("--standalone")
    result = subprocess.run(
        [*launcher[:place], "--max-restarts", "2", *launcher[place:]],
        env=broken(tmp_path / "done", FAULTS[0], FAULTS[2]),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert len(list((tmp_path / "done").iterdir())) == 2
    assert losses(tmp_path / "run") == losses(tmp_path / "undisturbed")


@pytest.mark.slow
def test_a_hung_rank_ends_the_job_with_the_stacks_of_all(tmp_path: Path, sections: dict[str, Any]):
    train = {**sections["train"], "hang_minutes": 0.1}
    file = write_run(tmp_path / "run.yaml", **{**sections, "train": train})
    start = time.monotonic()
    result = subprocess.run(
        command(2, "--config", str(file)),
        env=broken(tmp_path / "done", {"point": "hang", "rank": 1, "call": 5}),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert result.returncode != 0
    assert time.monotonic() - start < 90
    assert (tmp_path / "done" / "0").exists()
    stacks = [(tmp_path / "run" / "stacks" / f"rank{rank}.txt").read_text() for rank in (0, 1)]
    assert "_hang_here" in stacks[1]
    assert "_hang_here" not in stacks[0]
    assert "forward_backward" in stacks[0], "where the other one waited"
    assert "of step 3" in stacks[0]
    assert "rank 1 hangs" in result.stderr
    assert complete_tags(tmp_path / "run" / "checkpoints") == ["global_step2"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Return a directory on a file system of its own, with space for a checkpoint and a half."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = os.geteuid() == 0 and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1000k", "tmpfs", str(place)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.slow
def test_a_full_disk_is_said_retried_and_leaves_the_last_checkpoint(
    tmp_path: Path, sections: dict[str, Any], small_disk: Path
):
    train = {**sections["train"], "save_async": True, "save_retries": 1, "keep_last": 1}
    file = write_run(tmp_path / "run.yaml", **{**sections, "train": train})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(small_disk)
    result = run_training(2, "--config", str(file))
    assert result.returncode != 0
    assert "trying again (1 of 1)" in result.stderr
    assert "step 4 is not saved (failure 1" in result.stderr
    assert "cannot be saved" in result.stderr
    assert "from global_step2" in result.stderr
    assert "CheckpointError" not in result.stderr, "a traceback, not a message"
    assert len(read_metrics(tmp_path / "run")) > 4, "training goes on meanwhile"
    assert complete_tags(small_disk) == ["global_step2"]
    Manifest.read(small_disk / "global_step2").verify(small_disk / "global_step2")
    assert not list(small_disk.glob(".tmp-*")), "half a checkpoint only fills the disk"
    subprocess.run(["mount", "-o", "remount,size=50m", str(small_disk)], check=True)
    result = run_training(2, "--config", str(file))
    assert result.returncode == 0, result.stderr
    assert complete_tags(small_disk) == [f"global_step{NUM_STEPS}"]
