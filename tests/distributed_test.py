"""One way to run a function of a test on several gloo ranks."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = 300.0


def run_distributed_test(
    work: Callable[..., Any], world_size: int, *args: Any, group: bool = True, timeout: float = TIMEOUT
) -> list[Any]:
    """Run ``work(rank, *args)`` on several processes of this machine.

    The ranks are forked from one process that has imported the test's module, so that its imports are paid once.

    Args:
        work: A function at the top level of its module. It returns a value that pickle takes.
        world_size: Number of ranks.
        args: Arguments after the rank; pickle takes them.
        group: Whether the default gloo group is joined before ``work`` runs, and left after it. Without it the ranks
            have the variables of a launcher in their environment (``RANK``, ``MASTER_PORT``, ...).
        timeout: Seconds after which the ranks are killed.

    Returns:
        What each rank returned, in the order of ranks.

    Raises:
        torch.multiprocessing.ProcessRaisedException: A rank raised; the message has its traceback.
        TimeoutError: The ranks did not end in time.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.set_forkserver_preload([work.__module__])
    with tempfile.TemporaryDirectory() as directory:
        task = (work, args, world_size, port if not group else None, directory)
        ranks = mp.start_processes(_run, task, world_size, join=False, start_method="forkserver")
        assert ranks is not None
        end = time.monotonic() + timeout
        while not ranks.join(timeout=1):
            if time.monotonic() > end:
                for process in ranks.processes:
                    process.kill()
                    process.join()
                raise TimeoutError(f"{work.__module__}.{work.__name__} on {world_size} ranks took over {timeout:g} s")
        return [pickle.loads(Path(directory, str(rank)).read_bytes()) for rank in range(world_size)]


def _run(
    rank: int, work: Callable[..., Any], args: tuple[Any, ...], world_size: int, port: int | None, directory: str
) -> None:
    torch.set_num_threads(1)
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    if port is None:
        store = dist.FileStore(f"{directory}/store", world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(minutes=2))
    else:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    result = work(rank, *args)
    Path(directory, str(rank)).write_bytes(pickle.dumps(result))
    if dist.is_initialized():
        dist.destroy_process_group()
