"""The flight recorder of real gloo ranks."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from statex_dist.distributed import flight_recorder
from tests.distributed_test import run_distributed_test


def record(rank: int, directory: str) -> str:
    flight_recorder.enable(Path(directory))
    store = dist.FileStore(f"{directory}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    dist.all_reduce(torch.ones(3))
    if rank == 0:
        dist.all_reduce(torch.ones(5), async_op=True)  # rank 1 does not come
    path = flight_recorder.dump(Path(directory), rank)
    assert path is not None
    return path.name


def test_the_collectives_of_each_rank_are_written(tmp_path: Path):
    names = run_distributed_test(record, 2, str(tmp_path), group=False)
    assert names == ["collectives_rank0", "collectives_rank1"]
    for name in names:
        entries = pickle.loads((tmp_path / name).read_bytes())["entries"]
        assert "gloo:all_reduce" in [entry["profiling_name"] for entry in entries]
    command = ["-m", "torch.distributed.flight_recorder.fr_trace", "--prefix", flight_recorder.PREFIX, str(tmp_path)]
    result = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True)
    assert "missing ranks: {1}" in result.stdout + result.stderr


def test_what_the_user_has_set_stays(tmp_path: Path):
    given = {"TORCH_NCCL_TRACE_BUFFER_SIZE": "0", "TORCH_FR_DUMP_TEMP_FILE": "mine", "TORCH_NCCL_DUMP_ON_TIMEOUT": "0"}
    environment = dict(given)
    flight_recorder.enable(tmp_path, environment)
    assert environment == given
    flight_recorder.enable(tmp_path, environment := {})
    assert environment["TORCH_FR_DUMP_TEMP_FILE"] == os.fspath(tmp_path / "collectives_rank")


def test_without_ranks_there_is_nothing_to_write(tmp_path: Path):
    assert flight_recorder.dump(tmp_path, 0) is None
