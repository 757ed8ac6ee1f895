"""Which ranks have the same run directory: all of them, or those of each host where it lies on the host's own disk."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path

from statex_dist.distributed.ranks import Ranks


@dataclass(frozen=True, slots=True)
class Disks:
    """The disks that a job's run directories lie on; of each disk the first rank, its leader, manages the directory.

    Attributes:
        rank: This process.
        members: Ranks of each disk, in order.
        hosts: Host name of each disk.
    """

    rank: int
    members: tuple[tuple[int, ...], ...]
    hosts: tuple[str, ...]

    @classmethod
    def one(cls, rank: int, world_size: int) -> Disks:
        """Return the one disk that all ranks share."""
        return cls(rank, (tuple(range(world_size)),), (socket.gethostname(),))

    @classmethod
    def find(cls, directory: Path, ranks: Ranks) -> Disks:
        """Return the disks of a directory that exists on every rank; all ranks call it together."""
        stat = directory.stat()
        seen = ranks.gather((socket.gethostname(), stat.st_dev, stat.st_ino))
        places = list(dict.fromkeys(seen))
        members = tuple(tuple(r for r, place in enumerate(seen) if place == own) for own in places)
        return cls(ranks.rank, members, tuple(host for host, *_ in places))

    @property
    def is_one(self) -> bool:
        """Whether all ranks share one disk."""
        return len(self.members) == 1

    @property
    def index(self) -> int:
        """Number of this rank's disk."""
        return next(index for index, ranks in enumerate(self.members) if self.rank in ranks)

    @property
    def mine(self) -> tuple[int, ...]:
        """Ranks of this rank's disk."""
        return self.members[self.index]

    @property
    def leads(self) -> bool:
        """Whether this rank manages its disk's directory."""
        return self.mine[0] == self.rank

    @property
    def leaders(self) -> list[int]:
        """The first rank of each disk."""
        return [ranks[0] for ranks in self.members]

    def named(self, index: int) -> str:
        """Return a disk's host and ranks, for messages."""
        ranks = self.members[index]
        return f"{self.hosts[index]} (ranks {ranks[0]} to {ranks[-1]})"
