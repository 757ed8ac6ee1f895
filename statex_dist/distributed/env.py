"""Where this process stands among the others, from the variables that every launcher sets."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from statex_dist.errors import ConfigError, shown


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
    """Read RANK, LOCAL_RANK and WORLD_SIZE; a process without a launcher is rank 0 of 1.

    Raises:
        ConfigError: They are no numbers, contradict each other, or are not all set.
    """
    world_size, local_rank = _number("WORLD_SIZE", 1, lowest=1), _number("LOCAL_RANK", 0)
    if world_size > 1 and not os.environ.get("RANK"):
        raise ConfigError(
            f"WORLD_SIZE is {world_size}, but RANK is not set; start the ranks with torchrun or deepspeed, or unset "
            "WORLD_SIZE for one process"
        )
    rank = _number("RANK", 0)
    if rank >= world_size:
        raise ConfigError(
            f"RANK {rank} is not below WORLD_SIZE {world_size}; ranks count from 0: set both alike on every process, "
            "or start them with torchrun or deepspeed"
        )
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    return ProcessEnv(rank=rank, local_rank=local_rank, world_size=world_size, device=device)


_OTHER_LAUNCHERS = {
    "srun": ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID"),
    "Open MPI": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "MPI": ("PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID"),
}
"""Variables of launchers that do not set ours: number of processes, number of this one, and on its host."""


def require_launcher() -> None:
    """Raise if another launcher started several processes, each of which would take itself for the only one.

    Raises:
        ConfigError: It did.
    """
    if os.environ.get("RANK") or os.environ.get("WORLD_SIZE"):
        return
    for launcher, (size, rank, local_rank) in _OTHER_LAUNCHERS.items():
        count = os.environ.get(size, "")
        if count.isdecimal() and int(count) > 1:
            raise ConfigError(
                f"{launcher} started {count[:9]} processes ({size}), but RANK and WORLD_SIZE are not set; start one "
                f"torchrun a host, or set RANK=${rank}, WORLD_SIZE=${size}, LOCAL_RANK=${local_rank}, MASTER_ADDR and "
                "MASTER_PORT in each"
            )


def require_device(env: ProcessEnv) -> None:
    """Raise if this process has no device of its own.

    Raises:
        ConfigError: It is on a machine with fewer GPUs than processes, or one of several is not told its GPU.
    """
    count = torch.cuda.device_count() if env.device.type == "cuda" else 0
    if count > 1 and env.world_size > 1 and not os.environ.get("LOCAL_RANK"):
        raise ConfigError(
            f"LOCAL_RANK is not set, and {count} GPUs can be seen here: all ranks of this host would take the "
            "first; start them with torchrun or deepspeed, or set LOCAL_RANK to each one's number on its host"
        )
    if env.device.type == "cuda" and env.local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"LOCAL_RANK {env.local_rank} has no GPU: {torch.cuda.device_count()} can be seen here "
            f"(CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'unset')}); start fewer ranks on this host"
        )


def _number(name: str, default: int, *, lowest: int = 0) -> int:
    text = os.environ.get(name) or str(default)
    if not (text.isdecimal() and text.isascii() and len(text) < 10 and int(text) >= lowest):
        raise ConfigError(
            f"{name} {shown(text)} is not a number of {lowest} or more; start the ranks with torchrun or deepspeed, or "
            "unset it for one process"
        )
    return int(text)


def local_world_size() -> int:
    """Return the number of processes on this host, as torchrun or deepspeed gives it; 1 without a launcher."""
    return max(_number("LOCAL_WORLD_SIZE", 1), _number("LOCAL_SIZE", 1))


def share_cores(env: ProcessEnv) -> None:
    """Divide the machine's cores among its processes, unless OMP_NUM_THREADS says otherwise.

    torchrun sets that variable and the deepspeed launcher does not: every rank would then use all cores, and several
    CPU ranks on one machine would spend their time waiting for each other.
    """
    local_ranks = local_world_size()
    if env.device.type == "cpu" and local_ranks > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_ranks))
