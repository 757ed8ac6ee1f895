"""Where this process stands among the others, from the variables that every launcher sets."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from statex_dist.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessEnv:
    """Rank, world size and device of this process."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def backend(self) -> str:
        """Communication backend: NCCL between GPUs, gloo on CPUs."""
        return "nccl" if self.device.type == "cuda" else "gloo"


def read_env() -> ProcessEnv:
    """Read RANK, LOCAL_RANK and WORLD_SIZE; a process without a launcher is rank 0 of 1."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    return ProcessEnv(
        rank=int(os.environ.get("RANK", "0")),
        local_rank=local_rank,
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        device=device,
    )


def share_cores(env: ProcessEnv) -> None:
    """Divide the machine's cores among its processes, unless OMP_NUM_THREADS says otherwise.

    torchrun sets that variable and the deepspeed launcher does not: every rank would then use all cores, and several
    CPU ranks on one machine would spend their time waiting for each other.
    """
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")
    if env.device.type == "cpu" and local_world_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_world_size))


def join_processes(env: ProcessEnv, backend: str, *, join_limit: timedelta, wait_limit: timedelta) -> None:
    """Join the processes that a launcher started.

    Args:
        env: This process among them.
        backend: Communication backends, in torch's form.
        join_limit: Longest wait for the others to start.
        wait_limit: Longest wait for one that runs.

    Raises:
        ConfigError: The launcher's variables lead nowhere.
    """
    try:
        store, rank, size = next(dist.rendezvous("env://", env.rank, env.world_size, timeout=join_limit))
        store.set_timeout(wait_limit)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=wait_limit)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"WORLD_SIZE is {env.world_size}, but the ranks do not find each other ({' '.join(str(error).split())}); "
            "start them with torchrun or deepspeed, or unset WORLD_SIZE"
        ) from None
