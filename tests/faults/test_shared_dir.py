"""Run directories that the ranks do not share, from the start or from one save to the next."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from statex_dist.checkpoint.layout import complete_tags
from statex_dist.checkpoint.manifest import Manifest
from statex_dist.train.metrics import read_metrics
from tests.runs import GLA, REPOSITORY, environment, make_shards, write_run

pytestmark = pytest.mark.distributed

STEPS = 6


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A run whose directory is relative: each rank is started in a directory of its own."""
    for rank in (0, 1):
        (tmp_path / f"host{rank}").mkdir()
    return write_run(
        tmp_path / "run.yaml",
        run_dir="run",
        model={"config": {**GLA, "num_hidden_layers": 1}},
        data={"path": str(make_shards(tmp_path / "data"))},
        train={"num_steps": STEPS, "save_every": 2, "keep_last": 3},
    )


def start(config: Path, before: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """Start two ranks, each in its own directory and below the command ``before``."""
    rank = f'cd {config.parent}/host$RANK && exec {before} {sys.executable} {REPOSITORY}/launch/train.py --config "$0"'
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no-python"]
    return subprocess.run(
        [sys.executable, *launcher, "bash", "-c", rank, str(config)],
        env={
            **environment(),
            "PYTHONPATH": str(Path(__file__).parent / "injected"),
            "STATEX_FAULTS": "[]",
            "STATEX_FAULTS_DONE": str(config.parent),
            "STATEX_PATIENCE": "1",
            **variables,
        },
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def test_ranks_with_directories_of_their_own_are_refused(tmp_path: Path, config: Path):
    result = start(config)
    errors = [line for line in result.stderr.splitlines() if "error: " in line]
    assert [line.startswith("error: ") for line in errors] == [True], result.stderr
    for line in errors:
        assert "(rank 1) and rank 0 on " in line
        assert "do not have the same directory at run_dir run" in line
        assert len(line) <= 400
    assert "exitcode  : 2 " in result.stderr  # torchrun may end the other rank, which has spoken by then
    assert 'Traceback (most recent call last):\n  File "' + str(REPOSITORY) not in result.stderr
    assert [list((tmp_path / f"host{rank}").iterdir()) for rank in (0, 1)] == [[], []]


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_rank_that_cannot_write_there_is_named(tmp_path: Path, config: Path):
    run = tmp_path / "shared"
    run.mkdir()
    for rank in (0, 1):
        (tmp_path / f"host{rank}" / "run").symlink_to(run)
    read_only = tmp_path / "read-only.sh"
    mount = f"mount --bind {run} {run} && mount -o remount,ro,bind {run}"
    read_only.write_text(f'[ "$RANK" = 0 ] && exec "$@"\n{mount} && exec "$@"\n')
    result = start(config, f"unshare -m bash {read_only}")
    if "unshare failed" in result.stderr or "mount: " in result.stderr:
        pytest.skip("mounts of a process's own are not allowed here")
    words = r"^error: run_dir run cannot be used on .* .rank 1.: Read-only file system"
    assert re.search(words, result.stderr, re.MULTILINE), result.stderr
    assert "[rank 1] error: " not in result.stderr
    assert "exitcode  : 2 " in result.stderr  # torchrun may end rank 0, which has reported by then
    assert [path.name for path in run.iterdir()] == ["status.json"], "nothing but why it failed"


def write_fault(config: Path, point: str, rank: int) -> dict[str, Any]:
    """Give both ranks links to one directory; the fault leads one of them to another, as without the mount."""
    shared, elsewhere = config.parent / "shared", config.parent / "elsewhere"
    shared.mkdir()
    (elsewhere / "checkpoints").mkdir(parents=True)
    if point == "mount away in a save":
        # Even where it could write: a directory of the same name lies there.
        (elsewhere / "checkpoints" / ".tmp-global_step4").mkdir()
    for host in (0, 1):
        (config.parent / f"host{host}" / "run").symlink_to(shared)
    link = str(config.parent / f"host{rank}" / "run")
    return {"point": point, "rank": rank, "call": 2, "link": link, "to": str(elsewhere)}


@pytest.mark.parametrize(
    ("point", "rank", "message"),
    [
        ("mount away in a save", 1, "rank 0 on .* does not see 2 of 4 files in .*zero_pp_rank_1_.* .of rank 1 on "),
        pytest.param("mount away", 1, "rank 1 on .* cannot see .*, which rank 0 has made", marks=pytest.mark.slow),
        pytest.param("mount away", 0, "is not the directory in which this run began", marks=pytest.mark.slow),
        pytest.param("mount away in a save", 0, "is not saved", marks=pytest.mark.slow),
    ],
)
def test_a_mount_that_goes_away_between_saves_costs_no_checkpoint(
    tmp_path: Path, config: Path, point: str, rank: int, message: str
):
    fault = write_fault(config, point, rank)
    result = start(config, STATEX_FAULTS=json.dumps([fault]))
    assert (tmp_path / "0").exists(), "it has not happened"
    assert result.returncode != 0
    for step in (4, 6):
        assert f"saved run/checkpoints/global_step{step}" not in result.stderr
    assert "checkpoint of step 6 cannot be saved" in result.stderr
    flat = " ".join(result.stderr.split())

    assert re.search(message, flat), result.stderr
    checkpoints = tmp_path / "shared" / "checkpoints"
    assert complete_tags(checkpoints) == ["global_step2"]
    assert (checkpoints / "latest").read_text() == "global_step2"
    Manifest.read(checkpoints / "global_step2").verify(checkpoints / "global_step2")
    assert not list((tmp_path / "elsewhere").rglob("MANIFEST.json"))
    assert not list((tmp_path / "elsewhere").rglob("*.pt"))

    back = Path(fault["link"])
    back.unlink()
    back.symlink_to(tmp_path / "shared")
    result = start(config)
    assert result.returncode == 0, result.stderr
    assert "resuming from run/checkpoints/global_step2" in result.stderr
    assert [record["step"] for record in read_metrics(tmp_path / "shared")] == list(range(1, STEPS + 1))
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        *(f"global_step{step}" for step in (2, 4, 6)),
        "latest",
    ]
