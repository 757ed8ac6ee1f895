"""Several worker processes: the same bytes, and kills, errors and Ctrl-C in the middle of the real command."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.synthetic_zero3 import write_random_zero3
from checkpoints_tools.io.target_writer import WriteOptions
from checkpoints_tools.io.worker_processes import cut_evenly, in_processes
from checkpoints_tools.reshard.reshard import reshard
from checkpoints_tools.verify.verify import verify_alone, verify_same
from statex_dist.errors import CheckpointError, ConfigError
from tests.runs import REPOSITORY

TARGETS = {
    "zero3": {"to": "zero3", "world_size": 3},
    "one file": {"to": "hf"},
    "shards": {"to": "hf"},
}

SLOW = """
import sys, time
from checkpoints_tools.io import target_writer
from launch.cli import main

target_writer.SYNC_BYTES = 20_000  # the models of tests are small
write = target_writer._Writer.write

def slow(self, jobs, stream):
    time.sleep(0.05 * len(jobs))
    write(self, jobs, stream)

target_writer._Writer.write = slow
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("source") / "run"
    write_random_zero3(run / "global_step5", {f"layers.{i}.weight": (40 + i, 16) for i in range(30)}, 5)
    return run


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("whole") / "out"
    reshard(source, target, **TARGETS["zero3"])
    return target


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def start(source: Path, target: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", SLOW, "reshard", "--source", source, "--target", target, "--to", "zero3"]
    command += ["--world-size", 3, "--processes", 3, "--workers", 1, "--resume"]
    return subprocess.Popen(
        [*map(str, command)], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def workers_of(process: subprocess.Popen) -> list[int]:
    """Wait for the worker processes that write tensors, and return them."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while process.poll() is None:
        found = [int(word) for word in children.read_text().split()]
        if len(found) == 3:
            return found
        time.sleep(0.01)
    raise AssertionError(process.communicate())


def wait_for_tensors(partial: Path) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        path = partial / "JOURNAL.jsonl"
        if path.exists() and '"tensors"' in path.read_text():
            return
        time.sleep(0.01)
    raise AssertionError("nothing was written")


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("layout", TARGETS)
def test_processes_do_not_matter(source, tmp_path, layout):
    for processes in (1, 4):
        options = WriteOptions(processes=processes, max_shard_size=10**9 if layout == "one file" else 9000)
        reshard(source, tmp_path / f"{processes}", **TARGETS[layout], options=options)
    assert files_of(tmp_path / "1") == files_of(tmp_path / "4")


@pytest.mark.parametrize("victim", ["worker", "parent"])
def test_killed_and_resumed_gives_the_same_bytes(source, whole, tmp_path, victim):
    process = start(source, tmp_path / "out")
    wait_for_tensors(tmp_path / ".tmp-out")
    workers = workers_of(process)
    os.kill(workers[1] if victim == "worker" else process.pid, signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (2 if victim == "worker" else -signal.SIGKILL)
    if victim == "worker":
        assert err.splitlines()[-1].startswith("error: a worker process ended")
    deadline = time.monotonic() + 10
    while any(map(is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(is_running, workers))
    assert not (tmp_path / "out").exists()
    journal = (tmp_path / ".tmp-out/JOURNAL.jsonl").read_text()
    kept = {name for line in journal.splitlines() for name in json.loads(line).get("tensors", {})}
    assert kept
    again = []
    reshard(
        source,
        tmp_path / "out",
        **TARGETS["zero3"],
        options=WriteOptions(resume=True, processes=2),
        progress=lambda count, total: again.append(count / total),
    )
    assert again[0] >= len(kept) / 200, "what was on disk is not written again"
    assert files_of(tmp_path / "out") == files_of(whole)


def test_ctrl_c_ends_all(source, tmp_path):
    process = start(source, tmp_path / "out")
    wait_for_tensors(tmp_path / ".tmp-out")
    workers = workers_of(process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "interrupted"
    assert not any(map(is_running, workers))


def test_damage_found_by_a_worker_is_the_error(source, tmp_path):
    damaged = tmp_path / "run"
    damaged.mkdir()
    subprocess.run(["cp", "-r", f"{source}/.", damaged], check=True)
    path = damaged / "global_step5/bf16_zero_pp_rank_3_mp_rank_00_optim_states.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    for processes in (1, 3):
        with pytest.raises(CheckpointError, match="CRC-32"):
            reshard(damaged, tmp_path / "out", **TARGETS["zero3"], options=WriteOptions(processes=processes))
        assert [line for line in verify_alone(damaged, processes=processes).differences if path.name in line]
    assert not (tmp_path / ".tmp-out").exists()


def test_verify_in_processes_finds_the_same(source, whole, tmp_path):
    for processes in (1, 3):
        verdict = verify_same(source, whole, processes=processes)
        assert verdict.ok
        assert dict(verdict.tensors) == {"kept": 30, "exp_avg": 30, "exp_avg_sq": 30}
    other = tmp_path / "other"
    write_random_zero3(other / "global_step5", {f"layers.{i}.weight": (40 + i, 16) for i in range(30)}, 4)
    found = [verify_same(source, other, processes=processes).differences for processes in (1, 3)]
    assert found[0] == found[1] != []


def test_shares_are_consecutive_and_none_is_lost():
    for count in (1, 2, 7):
        shares = cut_evenly(range(20), [*range(20)], count)
        assert [item for share in shares for item in share] == [*range(20)]
        assert len(shares) == count
    assert [sum(share) for share in cut_evenly(range(100), [*range(100)], 2)] == pytest.approx([2475, 2475], rel=0.1)


def test_what_a_worker_raises_is_raised_here():
    def work(share, send):
        send(share)
        if share == 2:
            raise ConfigError("no such thing")
        time.sleep(30 * (share != 2))

    with pytest.raises(ConfigError, match="no such thing"):
        in_processes([1, 2, 3], work)
    with pytest.raises(ZeroDivisionError):
        in_processes([1, 2], lambda share, send: 1 / 0)


def test_processes_are_whole_numbers():
    with pytest.raises(ConfigError):
        WriteOptions(processes=0)
