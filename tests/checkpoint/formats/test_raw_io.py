"""Targets and sources of more files than a process may open."""

import os
import threading
from pathlib import Path

from statex_dist.checkpoint.formats.raw_io import Descriptors
from tests.checkpoints_tools.builders import GLA, load_all, write_model
from tests.launch.limited import run_limited


def test_more_ranks_than_open_files(tmp_path):
    tensors = write_model(tmp_path / "gla", GLA)
    ranks, back = tmp_path / "ranks", tmp_path / "back"
    results = run_limited(
        [
            ["reshard", "--source", tmp_path / "gla", "--target", ranks, "--to", "zero3", "--world-size", 60],
            ["reshard", "--source", ranks, "--target", back, "--to", "hf", "--workers", 8],
            ["verify", ranks, back],
            ["reshard", "--source", ranks, "--target", tmp_path / "no", "--to", "hf", "--workers", 30],
            ["verify", ranks, "--workers", 40],
        ],
        tmp_path,
        files=48,
        memory=4 << 30,
        seconds=120,
    )
    assert [result["code"] for result in results] == [0, 0, 0, 2, 2], results
    assert all("--workers" in result["err"].splitlines()[-1] for result in results[3:]), "no verdict on the files"
    assert not (tmp_path / "no").exists()
    assert len([*ranks.glob("global_step0/*.pt")]) == 120
    read = load_all(back)
    assert read.keys() == tensors.keys()
    assert all((read[name] == tensors[name]).all() for name in tensors)


def test_files_are_closed_when_others_are_needed_and_never_while_they_are_used(tmp_path):
    paths = [tmp_path / str(number) for number in range(20)]
    for path in paths:
        path.write_bytes(bytes(800))
    pool, barrier = Descriptors(3), threading.Barrier(8)

    def write(thread: int) -> None:
        barrier.wait()
        for step in range(400):
            with pool.borrow(paths[(step * 7 + thread) % 20]) as descriptor:
                os.pwrite(descriptor, bytes([thread + 1]), (step // 20) * 8 + thread)

    before = len([*Path("/proc/self/fd").iterdir()])
    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with pool.borrow(paths[0]):
        assert len([*Path("/proc/self/fd").iterdir()]) - before <= 8
        pool.close(paths[0])
    for path in paths:
        pool.close(path)
    assert len([*Path("/proc/self/fd").iterdir()]) == before
    assert all(path.read_bytes() == bytes(range(1, 9)) * 20 + bytes(640) for path in paths)
