"""Kills and full disks in the middle of a reshard, in layouts whose files all come to their end together."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.synthetic_zero3 import write_zero3
from checkpoints_tools.io import target_writer
from checkpoints_tools.io.target_writer import WriteOptions
from checkpoints_tools.reshard.reshard import reshard
from checkpoints_tools.verify.verify import verify_alone
from statex_dist.errors import CheckpointError
from statex_dist.models.source import open_source
from tests.checkpoints_tools.builders import GLA, random_tensors, write_model
from tests.runs import REPOSITORY

TARGETS = {
    "zero3": {"to": "zero3", "world_size": 3},
    "tp": {"to": "tp", "tp": 4},
    "megatron": {"to": "megatron"},
    "hf": {"to": "hf"},
}

KILLED = """
import json, os, signal, sys
from checkpoints_tools.io import target_writer
from checkpoints_tools.reshard.reshard import reshard
from checkpoints_tools.io.target_writer import WriteOptions

target_writer.SYNC_BYTES = 20_000  # the models of tests are small

def progress(done, total):
    if done >= float(sys.argv[4]) * total:
        os.kill(os.getpid(), signal.SIGKILL)

options = WriteOptions(resume=True, workers=2)
reshard(sys.argv[1], sys.argv[2], **json.loads(sys.argv[3]), options=options, progress=progress)
"""


@pytest.fixture
def source(tmp_path) -> Path:
    values = {**GLA, "num_hidden_layers": 6}
    tag = tmp_path / "run/global_step5"
    write_zero3(tag, random_tensors(values), 2, sub_group_size=9000)
    (tag / "model").mkdir()
    (tag / "model/config.json").write_text(json.dumps(values))
    return tmp_path / "run"


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def kill(source: Path, target: Path, options: dict, share: float) -> Path:
    command = [sys.executable, "-c", KILLED, str(source), str(target), json.dumps(options), str(share)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert not target.exists()
    return target.with_name(f".tmp-{target.name}")


@pytest.mark.parametrize("layout", TARGETS)
@pytest.mark.parametrize("shares", [(0.2,), (0.6,), (0.97,), (0.3, 0.7)])
def test_killed_and_resumed_gives_the_same_bytes(source, tmp_path, layout, shares, monkeypatch):
    monkeypatch.setattr(target_writer, "SYNC_BYTES", 20_000)
    options = TARGETS[layout]
    reshard(source, tmp_path / "whole", **options)
    for share in shares:
        left = kill(source, tmp_path / "out", options, share)
    lines = [json.loads(line) for line in (left / "JOURNAL.jsonl").read_text().splitlines()]
    done = {name for line in lines for name in line.get("tensors", {})}
    assert done or shares[-1] < 0.3
    again = []
    reshard(
        source,
        tmp_path / "out",
        **options,
        options=WriteOptions(resume=True),
        progress=lambda count, total: again.append(count / total),
    )
    assert min(again) > 0.02 if done else True, "what was on disk is not written again"
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert not left.exists()


def test_a_partial_file_that_was_lost_is_written_again(source, tmp_path, monkeypatch):
    monkeypatch.setattr(target_writer, "SYNC_BYTES", 20_000)
    reshard(source, tmp_path / "whole", **TARGETS["zero3"])
    left = kill(source, tmp_path / "out", TARGETS["zero3"], 0.7)
    next(left.rglob("*rank_1*optim*.partial")).unlink()
    reshard(source, tmp_path / "out", **TARGETS["zero3"], options=WriteOptions(resume=True))
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_bytes_of_a_partial_file_that_changed_are_noticed(source, tmp_path, monkeypatch):
    """Bytes of an earlier run are read again for the checksums of the whole: these cover the bytes on disk."""
    monkeypatch.setattr(target_writer, "SYNC_BYTES", 20_000)
    left = kill(source, tmp_path / "out", TARGETS["zero3"], 0.7)
    path = next(left.rglob("*rank_1*optim*.partial"))
    data = bytearray(path.read_bytes())
    start = next(i for i in range(len(data) // 2, len(data)) if data[i])
    data[start] ^= 1
    path.write_bytes(data)
    reshard(source, tmp_path / "out", **TARGETS["zero3"], options=WriteOptions(resume=True))
    assert not verify_alone(tmp_path / "out").ok


def test_a_flipped_byte_that_was_copied_before_the_kill_is_still_found(source, tmp_path):
    place = open_source(source).pieces("model.embeddings.weight")[0]
    data = bytearray(place.path.read_bytes())
    data[place.offset + 2] ^= 1
    place.path.write_bytes(data)
    left = kill(source, tmp_path / "out", TARGETS["zero3"], 0.9)
    assert "model.embeddings.weight" in (left / "JOURNAL.jsonl").read_text()
    with pytest.raises(CheckpointError, match=f"{place.path.name} .*CRC-32"):
        reshard(source, tmp_path / "out", **TARGETS["zero3"], options=WriteOptions(resume=True))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("other", [{"to": "zero3", "world_size": 4}, {"to": "tp", "tp": 2}, {"to": "hf"}])
def test_another_layout_is_not_resumed(source, tmp_path, other):
    kill(source, tmp_path / "out", TARGETS["zero3"], 0.7)
    with pytest.raises(CheckpointError, match="unfinished"):
        reshard(source, tmp_path / "out", **other, options=WriteOptions(resume=True))


@pytest.mark.parametrize("layout", TARGETS)
def test_workers_do_not_matter(source, tmp_path, layout):
    for workers in (1, 5):
        reshard(source, tmp_path / f"{workers}", **TARGETS[layout], options=WriteOptions(workers=workers))
    assert files_of(tmp_path / "1") == files_of(tmp_path / "5")


@pytest.mark.parametrize("layout", TARGETS)
def test_a_disk_too_small_is_refused_before_a_byte_is_written(tmp_path, layout):
    write_model(tmp_path / "in", {**GLA, "vocab_size": 4000})
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        with pytest.raises(CheckpointError, match=r"No space .*\d+ bytes .*\d+ are free"):
            reshard(tmp_path / "in", disk / "out", **TARGETS[layout])
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_random_kills_of_the_command(source, tmp_path):
    """The real command, killed at random moments until it comes through."""
    command = [
        sys.executable,
        "-m",
        "launch.cli",
        "reshard",
        "--source",
        str(source),
        "--target",
        str(tmp_path / "out"),
    ]
    command += ["--to", "zero3", "--world-size", "5", "--resume"]
    rng = random.Random(0)
    for attempt in range(6):
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(timeout=rng.uniform(0.2, 0.6) if attempt < 5 else 60)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        if (tmp_path / "out").exists():
            break
        assert process.returncode == -signal.SIGKILL
    reshard(source, tmp_path / "whole", to="zero3", world_size=5)
    ours, whole = files_of(tmp_path / "out"), files_of(tmp_path / "whole")
    assert {name for name in ours if ours[name] != whole[name]} <= {"global_step5/MANIFEST.json"}
    assert ours.keys() == whole.keys()
