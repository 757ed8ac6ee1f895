"""``--part I/N``: several machines, one target. Here they are processes that know nothing of each other."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.synthetic_zero3 import write_random_zero3
from checkpoints_tools.io import target as target_module
from checkpoints_tools.io import target_writer
from checkpoints_tools.io.target_writer import WriteOptions
from checkpoints_tools.reshard.reshard import reshard
from checkpoints_tools.verify.verify import verify_alone, verify_expansion, verify_same
from launch.cli import main
from statex_dist.errors import CheckpointError
from statex_dist.work_part import WorkPart
from tests.checkpoints_tools.builders import GLA, run_expand, write_model
from tests.runs import REPOSITORY

TARGETS = {
    "zero3": {"to": "zero3", "world_size": 3},
    "one file": {"to": "hf"},
    "shards": {"to": "hf"},
    "megatron": {"to": "megatron"},
}
PARTS = 3

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
    write_random_zero3(run / "global_step5", {f"layers.{i}.weight": (40 + i, 16) for i in range(20)}, 4)
    return run


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("whole") / "out"
    reshard(source, target, **TARGETS["zero3"])
    return target


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def write_part(source: Path, target: Path, index: int, *, count: int = PARTS, layout: str = "zero3", **options):
    options.setdefault("max_shard_size", 9000 if layout == "shards" else 5 * 10**9)
    return reshard(
        source, target, **TARGETS[layout], options=WriteOptions(part=WorkPart(index, count), **options)
    ).missing_parts


def command(source: Path, target: Path, part: str) -> list[str]:
    words = ["reshard", "--source", source, "--target", target, "--to", "zero3", "--world-size", 3, "--part", part]
    return [sys.executable, "-c", SLOW, *map(str, words), "--workers", "1"]


@pytest.mark.parametrize("layout", TARGETS)
def test_parts_do_not_matter(source, tmp_path, layout):
    shard = 9000 if layout == "shards" else 5 * 10**9
    reshard(source, tmp_path / "whole", **TARGETS[layout], options=WriteOptions(max_shard_size=shard))
    missing = [write_part(source, tmp_path / "out", part, layout=layout, processes=part) for part in (2, 3, 1)]
    assert missing == [[1, 3], [1], []]
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert write_part(source, tmp_path / "out", 2, layout=layout) == [], "it is complete already"


def test_parts_at_the_same_time(source, whole, tmp_path):
    running = [
        subprocess.Popen(command(source, tmp_path / "out", f"{part}/{PARTS}"), cwd=REPOSITORY, stderr=subprocess.PIPE)
        for part in (1, 2, 3)
    ]
    assert [process.wait(timeout=60) for process in running] == [0, 0, 0], [p.stderr.read() for p in running]
    assert files_of(tmp_path / "out") == files_of(whole)


def test_a_killed_part_is_run_again_alone_and_meanwhile_no_other_can(source, whole, tmp_path):
    target, partial = tmp_path / "out", tmp_path / ".tmp-out"
    process = subprocess.Popen(command(source, target, f"2/{PARTS}"), cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    journal = partial / f".parts/2-of-{PARTS}.jsonl"
    while not journal.exists() or '"tensors"' not in journal.read_text():
        assert process.poll() is None
        time.sleep(0.01)
    with pytest.raises(CheckpointError, match="part 2/3 is being written"):
        write_part(source, target, 2)
    with pytest.raises(CheckpointError, match="another process is writing"):
        reshard(source, target, **TARGETS["zero3"])
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert write_part(source, target, 1) == [2, 3]
    done = []
    options = WriteOptions(part=WorkPart(2, PARTS))
    reshard(source, target, **TARGETS["zero3"], options=options, progress=lambda *counts: done.append(counts))
    assert done[0][0] > 4000, "what was on disk is not written again"
    assert write_part(source, target, 3) == []
    assert files_of(target) == files_of(whole)


def test_what_does_not_belong_together_is_refused(source, tmp_path):
    target = tmp_path / "out"
    write_part(source, target, 1)
    before = files_of(tmp_path / ".tmp-out")
    with pytest.raises(CheckpointError, match="3 parts"):
        write_part(source, target, 2, count=4)
    with pytest.raises(CheckpointError, match="other"):
        write_part(source, target, 2, allow_nonfinite=True, max_shard_size=7777)
    for resume in (False, True):
        with pytest.raises(CheckpointError, match="--part"):
            reshard(source, target, **TARGETS["zero3"], options=WriteOptions(resume=resume))
    after = files_of(tmp_path / ".tmp-out")
    assert {name: after[name] for name in before} == before


def test_a_run_without_parts_is_not_continued_by_parts(source, tmp_path):
    partial = tmp_path / ".tmp-out"
    partial.mkdir()
    (partial / "JOURNAL.jsonl").write_text('{"run": "x"}\n')
    with pytest.raises(CheckpointError, match="without --part"):
        write_part(source, tmp_path / "out", 1)


@pytest.mark.parametrize("step", ["finish", "complete"])
def test_killed_while_the_target_is_completed(source, whole, tmp_path, step):
    """Any part can be run again: it continues from the files that are complete."""
    target = tmp_path / "out"
    for part in (1, 2):
        write_part(source, target, part)
    child = os.fork()
    if child == 0:
        if step == "finish":
            add = target_writer.TargetJournal.add

            def killed(self, *entry):
                if len(self.files) == 2:  # the third file has its name, and the journal does not say so
                    os.kill(os.getpid(), signal.SIGKILL)
                add(self, *entry)

            target_writer.TargetJournal.add = killed
        else:
            target_module.finish_target = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
        write_part(source, target, 3, processes=1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert not target.exists()
    assert write_part(source, target, 1) == []
    assert files_of(target) == files_of(whole)


def test_an_expansion_in_parts_and_processes(tmp_path):
    write_model(tmp_path / "base", GLA, shards=2)
    options = {"layers": "all", "factor": 2, "max_shard_size": 40_000}
    run_expand(tmp_path / "base", tmp_path / "whole", **options)
    for part in (2, 1):
        run_expand(tmp_path / "base", tmp_path / "out", **options, part=WorkPart(part, 2), processes=2)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert verify_expansion(tmp_path / "base", tmp_path / "out", processes=2).ok


def test_a_flipped_byte_that_one_part_read_stops_the_last(source, tmp_path):
    damaged = tmp_path / "run"
    shutil.copytree(source, damaged)
    path = damaged / "global_step5/bf16_zero_pp_rank_3_mp_rank_00_optim_states.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert write_part(damaged, tmp_path / "out", 1) == [2, 3]
    assert write_part(damaged, tmp_path / "out", 2) == [3]
    with pytest.raises(CheckpointError, match="CRC-32"):
        write_part(damaged, tmp_path / "out", 3)
    assert not (tmp_path / "out").exists()


def test_verify_in_parts_covers_everything(source, whole, tmp_path):
    damaged = tmp_path / "run"
    shutil.copytree(source, damaged)
    path = damaged / "global_step5/bf16_zero_pp_rank_3_mp_rank_00_optim_states.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    every = [WorkPart(index, PARTS) for index in range(1, PARTS + 1)]
    alone = [verify_alone(damaged, part=part) for part in every]
    assert [verdict.ok for verdict in alone].count(False) == 1
    assert [verdict.part for verdict in alone] == ["1/3", "2/3", "3/3"]
    sound = [verify_alone(whole, part=part) for part in every]
    counted = sum(verdict.tensors["storages by CRC-32"] for verdict in sound)
    assert counted == verify_alone(whole).tensors["storages by CRC-32"]
    assert sum(verdict.tensors["tensors by digest"] for verdict in sound) == 60
    pairs = [verify_same(source, whole, part=part) for part in every]
    assert all(verdict.ok for verdict in pairs)
    assert sum(sum(verdict.tensors.values()) for verdict in pairs) == 60


def test_the_command_says_which_parts_are_missing(source, tmp_path, capsys):
    words = ["reshard", "--source", str(source), "--target", str(tmp_path / "out"), "--to", "hf"]
    assert main([*words, "--part", "2/2"]) == 0
    assert capsys.readouterr().out.startswith(f"part 2/2 of {tmp_path / 'out'} is written; not done yet: part 1")
    assert main([*words, "--part", "3/2"]) == 2
    assert main([*words, "--part", "1/2"]) == 0
    assert main(["verify", str(tmp_path / "out"), "--part", "1/2"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("part 1/2 of ")
    assert main(["verify", str(source), str(tmp_path / "out"), "--as-expansion", "--part", "1/2"]) == 2
