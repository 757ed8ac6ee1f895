"""The ranks that share one model, and how they exchange what each has a part of."""

from __future__ import annotations

import importlib.util
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from statex_dist.distributed.error_sync import all_or_none
from statex_dist.errors import ConfigError


def require_megatron() -> None:
    """Raise unless megatron-core is installed, whose parallel layers cut a model's matrices.

    Raises:
        ConfigError: It is not.
    """
    if importlib.util.find_spec("megatron") is None:
        raise ConfigError(
            "--tp needs megatron-core: pip install 'statex-dist[megatron]' (it has no release for Python 3.14)"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorShare:
    """This process among the ranks that share a model; alone it is rank 0 of 1.

    Attributes:
        rank: Place of this process among them.
        size: How many they are.
        group: torch's process group; None for a process that is alone.
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum of every rank's ``x``: the same bits on all of them; no gradient flows."""
        if self.size == 1:
            return x
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self.group)
        return total

    def all_gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return every rank's ``x``, by rank; no gradient flows."""
        if self.size == 1:
            return [x]
        x = x.contiguous()
        gathered = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(gathered, x, group=self.group)
        return gathered

    def gather_objects(self, value: Any) -> list[Any]:
        """Return every rank's ``value``, by rank."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, group=self.group)
        return values

    def agree(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return rank 0's ``tokens``: ranks that sample separately could continue with different texts."""
        if self.size == 1:
            return tokens
        agreed = tokens.contiguous().clone()
        dist.broadcast(agreed, group_src=0, group=self.group)
        return agreed

    def together(self) -> AbstractContextManager[None]:
        """Wait at the end for all ranks; where one failed inside, all fail.

        Raises:
            OtherRankError: Another rank failed, and this one did not or comes after it.
        """
        return all_or_none(self.rank, self.gather_objects, work="the tensor-parallel ranks")

    def neighbours(self, size: int) -> TensorShare:
        """Divide the ranks into groups of ``size`` in a row and return this rank's; every rank must call this."""
        if size == self.size:
            return self
        if size == 1:
            return TensorShare()
        group, _ = dist.new_subgroups(group_size=size, group=self.group)
        return TensorShare(rank=self.rank % size, size=size, group=group)
