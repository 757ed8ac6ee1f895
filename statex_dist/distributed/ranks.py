"""Exchange values between ranks before there is an engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among its peers, which have joined a process group if there are several."""

    rank: int
    world_size: int

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's ``value``, by rank."""
        values: list[Any] = [value]
        if self.world_size > 1:
            values = [None] * self.world_size
            dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's ``value``."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values, src=0)
        return values[0]
