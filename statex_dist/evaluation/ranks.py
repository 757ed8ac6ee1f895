"""Several processes that share one evaluation: who is who, and how they wait for each other."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from statex_dist.distributed.env import read_env
from statex_dist.distributed.error_sync import OtherRankError, all_or_none
from statex_dist.distributed.joining import join_processes
from statex_dist.errors import StateXError

__all__ = ["EvalRanks", "OtherRankError", "open_ranks"]

WAIT_LIMIT = timedelta(hours=12)
"""Longest wait for a slower rank. A rank that dies ends the wait at once: its connections close."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalRanks:
    """This process among those of an evaluation; alone it is rank 0 of 1.

    Attributes:
        rank: Number of this process.
        world_size: Number of processes.
    """

    rank: int = 0
    world_size: int = 1

    def owns(self, index: int) -> bool:
        """Return whether piece ``index`` of shared work is this rank's."""
        return index % self.world_size == self.rank

    def together(self) -> AbstractContextManager[None]:
        """Wait at the end for all ranks; where one failed inside, all fail.

        Raises:
            OtherRankError: Another rank failed, and this one did not or comes after it.
        """
        return all_or_none(self.rank, self._gather, work="the evaluation")

    def _gather(self, value: int) -> list[int]:
        if self.world_size == 1:
            return [value]
        values = [0] * self.world_size
        begin = time.monotonic()
        try:
            dist.all_gather_object(values, value)
        except RuntimeError as error:
            silent = time.monotonic() - begin >= WAIT_LIMIT.total_seconds()
            what = f"was silent for {WAIT_LIMIT}" if silent else "ended (if it failed, it says why)"
            raise StateXError(
                f"another rank of the evaluation {what}; start the same command again: it goes on where it was"
            ) from error
        return values


@contextmanager
def open_ranks() -> Iterator[EvalRanks]:
    """Join the processes that a launcher (torchrun, deepspeed) started; without one, this process is alone.

    Raises:
        ConfigError: The launcher's variables contradict each other or lead nowhere.
    """
    env = read_env()
    if env.world_size == 1:
        yield EvalRanks()
        return
    # gloo whatever the device: only words are exchanged, never tensors.
    join_processes(env, "gloo", join_limit=WAIT_LIMIT, wait_limit=WAIT_LIMIT)
    try:
        yield EvalRanks(rank=env.rank, world_size=env.world_size)
    finally:
        dist.destroy_process_group()
