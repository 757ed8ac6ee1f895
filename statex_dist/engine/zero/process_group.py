"""Joining the ranks of a job, with DeepSpeed's communication set up."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Mapping
from datetime import timedelta

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist

from statex_dist.distributed.env import ProcessEnv
from statex_dist.distributed.joining import join_processes

DEEPSPEED_LOGGER = logging.getLogger("DeepSpeed")


def init_process_group(env: ProcessEnv, *, timeout_minutes: float, facts: Mapping[str, object] | None = None) -> None:
    """Join the other ranks, unless that has been done. A process without a launcher becomes a world of one.

    Args:
        env: This process.
        timeout_minutes: How long ranks wait for each other.
        facts: Settings that must be equal on all ranks, by name.

    Raises:
        StateXError: The ranks do not find each other, or differ.
    """
    if dist.is_initialized():
        return
    # Its CPU shared-memory collectives are compiled on first use (two minutes, under a lock that a killed job leaves
    # behind). gloo gives the same numbers without a compiler, so the operator is reported as not available.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    DEEPSPEED_LOGGER.setLevel(logging.WARNING)
    # DeepSpeed 0.19 calls collectives that torch 2.13 renames; every call would warn.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if env.world_size == 1 and "MASTER_PORT" not in os.environ:
        # A fixed port would make two one-process runs on one machine collide.
        store = dist.TCPStore("127.0.0.1", 0, is_master=True)
        dist.init_process_group(env.backend, store=store, rank=0, world_size=1)
    if env.device.type == "cuda":
        torch.cuda.set_device(env.device)
    limit = timedelta(minutes=timeout_minutes)
    if env.world_size > 1 and not dist.is_initialized():
        versions = {"torch": torch.__version__, "deepspeed": deepspeed.__version__, "python": sys.version.split()[0]}
        join_processes(env, env.backend, join_limit=limit, wait_limit=limit, facts={**versions, **(facts or {})})
    for name, value in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, str(value))
    deepspeed.init_distributed(env.backend, timeout=limit, auto_mpi_discovery=False, verbose=False)
