"""Where this process stands among the others, from the variables that every launcher sets."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch


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
