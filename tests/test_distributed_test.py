"""The helper that runs ranks: results by rank, a rank's error in the test, no rank left behind."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import ProcessRaisedException

from tests.distributed_test import run_distributed_test

pytestmark = pytest.mark.distributed


def reduce(rank: int, amount: float) -> tuple[int, float]:
    total = torch.tensor(amount * (rank + 1))
    dist.all_reduce(total)
    return rank, total.item()


def fail_on_rank_1(rank: int) -> None:
    if rank == 1:
        raise KeyError("of rank 1")
    time.sleep(600)


def hang(rank: int, directory) -> None:
    (directory / str(rank)).write_text(str(os.getpid()))
    time.sleep(60)


def test_results_are_in_the_order_of_ranks():
    assert run_distributed_test(reduce, 3, 0.5) == [(0, 3.0), (1, 3.0), (2, 3.0)]


def test_an_error_of_one_rank_ends_all():
    with pytest.raises(ProcessRaisedException, match="KeyError: 'of rank 1'"):  # and no TimeoutError of rank 0
        run_distributed_test(fail_on_rank_1, 2, timeout=60)


def test_ranks_that_hang_are_killed(tmp_path):
    with pytest.raises(TimeoutError):
        run_distributed_test(hang, 2, tmp_path, group=False, timeout=8)
    assert len(list(tmp_path.iterdir())) == 2
    for path in tmp_path.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.read_text()), 0)
