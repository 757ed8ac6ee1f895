"""Ranks that share a model, for the commands that run one: those of a launcher, or ones that are started here.

    if wants_ranks(tp):
        return start_ranks(tp, arguments, device=device)
    with open_tensor_parallel(tp, device=device) as share:
        ...

Under ``torchrun`` or ``deepspeed`` the ranks are there; else the command starts itself again, once for each rank.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from statex_dist.errors import ConfigError, StateXError

if TYPE_CHECKING:
    from statex_dist.models.tensor_parallel.share import TensorShare

JOIN_LIMIT = timedelta(minutes=2)
"""Longest wait for the other ranks to start."""
WAIT_LIMIT = timedelta(minutes=30)
"""Longest wait for a rank that still runs. One that dies ends the wait at once: its connections close."""
_RANK = Path(__file__).with_name("rank.py")
_PEER_IS_GONE = ("connection closed by peer", "connection reset by peer", "broken pipe")


def wants_ranks(tp: int | None) -> bool:
    """Return whether ``--tp`` asks for ranks that no launcher has started.

    Raises:
        ConfigError: It is not a number from 1, or megatron-core is missing.
    """
    if tp is not None and tp < 1:
        raise ConfigError(f"--tp must be 1 or more, not {tp}")
    if tp is not None:
        from statex_dist.models.tensor_parallel.share import require_megatron

        require_megatron()
    return tp is not None and tp > 1 and "WORLD_SIZE" not in os.environ


def start_ranks(tp: int, arguments: Sequence[str], *, device: str = "auto", module: str = "launch.cli") -> int:
    """Run a command on ``tp`` ranks of this machine, forward signals to all of them, and return its exit code.

    Args:
        tp: Number of ranks.
        arguments: The arguments after the command's name, ``--tp`` included.
        device: The value of ``--device``; on the CPU any number of ranks may run.
        module: The command's module.

    Raises:
        ConfigError: The machine has GPUs, but fewer than ``tp``.
        StateXError: A rank was killed.
    """
    import torch
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    gpus = 0 if device.startswith("cpu") else torch.cuda.device_count()
    if 0 < gpus < tp:
        raise ConfigError(
            f"--tp {tp} needs {tp} GPUs and this machine has {gpus}; give --tp {gpus}, --device cpu, or start the "
            "ranks on several machines with torchrun"
        )
    # The ranks report their errors themselves. torch gives each of its loggers a level of its own.
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=tp,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-P", str(_RANK), str(os.getpid()), module, *arguments)
    except ChildFailedError as error:
        code = max(failure.exitcode for failure in error.failures.values())
        if code > 0:
            return code
        rank, first = error.get_first_failure()
        killer = signal.Signals(-first.exitcode)
        hint = "; has the machine run out of memory?" if killer == signal.SIGKILL else ""
        raise StateXError(
            f"rank {rank} of {tp} was killed by {killer.name}, and the others were stopped{hint}"
        ) from None
    except SignalException as error:
        return 128 + error.sigval
    return 0


@contextmanager
def open_tensor_parallel(tp: int | None, *, device: str = "auto") -> Iterator[TensorShare | None]:
    """Join the ranks that share a model; None where this process has it alone.

    Args:
        tp: How many there should be; None for as many as the launcher started.
        device: ``--device``: ``cpu`` leaves a machine's GPUs alone.

    Raises:
        ConfigError: The launcher started another number, or the ranks do not find each other.
        OtherRankError: Another rank failed and says why.
    """
    import torch
    import torch.distributed as dist

    from statex_dist.distributed.env import read_env, share_cores
    from statex_dist.distributed.error_sync import OtherRankError
    from statex_dist.distributed.joining import join_processes
    from statex_dist.models.tensor_parallel.share import TensorShare

    env = read_env()
    if env.world_size == 1:
        if tp is not None and tp > 1:
            raise ConfigError(f"--tp {tp}, but there is 1 rank (WORLD_SIZE); start {tp} with torchrun, or unset it")
        yield None
        return
    if device.startswith("cpu"):
        env = replace(env, device=torch.device("cpu"))
    if env.device.type == "cuda":
        if env.local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"rank {env.rank} has no GPU: this machine has {torch.cuda.device_count()}; start fewer ranks, or give "
                "--device cpu"
            )
        torch.cuda.set_device(env.device)
    share_cores(env)
    # Both: words and flags of the ranks are exchanged on the CPU, whatever the model's device.
    backend = "cpu:gloo,cuda:nccl" if env.device.type == "cuda" else "gloo"
    join_processes(env, backend, join_limit=JOIN_LIMIT, wait_limit=WAIT_LIMIT)
    try:
        share = TensorShare(rank=env.rank, size=env.world_size, group=dist.group.WORLD)
        with share.together():
            if tp is not None and tp != env.world_size:
                raise ConfigError(f"--tp {tp}, but the launcher started {env.world_size} ranks; start {tp}")
        yield share
    except KeyboardInterrupt:
        if env.rank == 0:
            raise
        raise OtherRankError("interrupted, as rank 0 says", 130) from None
    except RuntimeError as error:
        if any(words in str(error).lower() for words in _PEER_IS_GONE):
            raise OtherRankError(f"another rank of {env.world_size} ended (if it failed, it says why)") from None
        raise
    finally:
        dist.destroy_process_group()
