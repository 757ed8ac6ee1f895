"""Checkpoints whose files lie on each host's own disk: which of them is whole, and how files get to other disks.

Every disk has a directory of each checkpoint, with a manifest of the files there, and ``disk`` in it says whose they
are. A checkpoint can be resumed from if the disks that are there have the files of all its ranks. A kill between two
disks' renames leaves one that only some of them have: it is passed over, and the one before it is on all of them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from statex_dist.checkpoint.layout import LATEST_NAME, complete_tags, rank_of, ranks_of, step_of
from statex_dist.checkpoint.manifest import FileRecord, Manifest
from statex_dist.distributed.disks import Disks
from statex_dist.engine.base import TrainEngine
from statex_dist.engine.copies import Copy, ring, run_copies
from statex_dist.engine.place import Part
from statex_dist.errors import CheckpointError, failure_text, reason

logger = logging.getLogger(__name__)

DISK_KEY = "disk"
"""Says in a manifest which ranks' files are on the disk, and which disks there were."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DiskPart:
    """The part of a checkpoint that is on one disk.

    Attributes:
        kind: Engine that wrote it.
        world_size: Ranks that wrote it.
        ranks: Those whose files are here.
        hosts: Host and ranks of every disk at that time.
    """

    kind: str
    world_size: int
    ranks: tuple[int, ...]
    hosts: tuple[tuple[str, tuple[int, ...]], ...]


def disk_info(disks: Disks, ranks: Sequence[int]) -> dict[str, Any]:
    """Return what a manifest says of the disk that it lies on, with the files of ``ranks``."""
    hosts = [[host, list(members)] for host, members in zip(disks.hosts, disks.members, strict=True)]
    return {DISK_KEY: {"ranks": sorted(ranks), "hosts": hosts}}


class DiskCheckpoints:
    """The checkpoints of a run on several disks. Every method is called by all ranks together.

    Args:
        engine: The ranks.
        directory: Directory of the checkpoints on this rank's disk.
        disks: Which ranks share a disk.
        neighbor_copy: Whether each disk's files are copied to the next disk.
    """

    def __init__(self, engine: TrainEngine, directory: Path, disks: Disks, *, neighbor_copy: bool):
        self.engine, self.directory, self.disks = engine, directory, disks
        self.neighbor_copy = neighbor_copy and not disks.is_one
        self._held: list[dict[str, DiskPart]] = []

    def ranks_here(self) -> list[int]:
        """Return the ranks whose files are on this rank's disk after a save."""
        index = self.disks.index
        before = self.disks.members[index - 1] if self.neighbor_copy else ()
        return sorted({*self.disks.mine, *before})

    def copy_to_neighbors(self, temporary: Path, parts: Sequence[Part]) -> str | None:
        """Copy each disk's files of a save to the next disk; return why that failed, the same on all ranks."""
        if not self.neighbor_copy:
            return None
        copies = []
        for source, target in ring(self.disks):
            records = [parts[rank][0] for rank in self.disks.members[source]]
            files = {name: FileRecord(**record) for part in records for name, record in part.items()}
            copies.append(Copy(self.disks.leaders[source], self.disks.leaders[target], files))
        problem = run_copies(copies, temporary, self.engine.rank, self.engine.device)
        return next((text for text in self.engine.gather(problem) if text), None)

    def choose(self, damaged: dict[str, str]) -> str | None:
        """Return the newest tag that the disks have together, or None where nothing has been saved.

        Args:
            damaged: Why a tag cannot be used; newer ones that are passed over are added.

        Raises:
            CheckpointError: There are some, and none has the files of all ranks; or it is another engine's.
        """
        found = self.engine.gather(self._look(damaged) if self.disks.leads else None)
        self._held = [found[leader][0] for leader in self.disks.leaders]
        tags = {tag for held in self._held for tag in held}
        lacking: dict[str, str] = {}
        for tag in sorted(tags, key=lambda tag: (-(step_of(tag) or 0), ranks_of(tag) or 0)):
            some = next(held[tag] for held in self._held if tag in held)
            if some.kind != self.engine.kind:
                raise CheckpointError(
                    f"{self.directory / tag} was written by engine {some.kind}, this run uses {self.engine.kind}; "
                    f"give --engine.name {some.kind}, or another run_dir"
                ).on_all_ranks(self.engine.rank)
            there = {rank for held in self._held if tag in held for rank in held[tag].ranks}
            if there.issuperset(range(some.world_size)):
                damaged.update(lacking)
                for lack in lacking.values() if self.engine.rank == 0 else ():
                    logger.warning("%s: going back to an older checkpoint", lack)
                return tag
            lacking[tag] = f"{self.directory / tag} lacks the files of {_whose(some, there)}"
        if problem := next(iter({**lacking, **damaged}.values()), None):
            raise CheckpointError(
                f"no checkpoint has the files of all ranks: {problem}; bring that host's disk back (with "
                "train.neighbor_copy another host would have had a copy), or start in another run_dir"
            ).on_all_ranks(self.engine.rank)
        if any(found[leader][1] for leader in self.disks.leaders):
            raise CheckpointError(
                f"{self.directory / LATEST_NAME} exists but no checkpoint there is complete; restore one, or start in "
                "another run directory"
            ).on_all_ranks(self.engine.rank)
        return None

    def _look(self, damaged: Mapping[str, str]) -> tuple[dict[str, DiskPart], bool]:
        """Return what this disk has, and whether it has a marker of a checkpoint."""
        held = {}
        for tag in complete_tags(self.directory):
            try:
                manifest = Manifest.read(self.directory / tag)
                disk, world_size = manifest.info.get(DISK_KEY), int(manifest.info["world_size"])
                ranks = range(world_size) if disk is None else disk["ranks"]
                hosts = () if disk is None else tuple((host, tuple(members)) for host, members in disk["hosts"])
            except (CheckpointError, KeyError, TypeError, ValueError) as error:
                # As if it were not there: the files of its ranks are missing, unless another disk has them.
                logger.warning("%s is passed over: %s", self.directory / tag, reason(error))
                continue
            if tag not in damaged:
                held[tag] = DiskPart(kind=manifest.kind, world_size=world_size, ranks=tuple(ranks), hosts=hosts)
        return held, (self.directory / LATEST_NAME).exists()

    def fetch(self, tag: str) -> str | None:
        """Get the files of a tag that this disk's ranks need and another disk has; the manifest says so afterwards.

        Returns:
            Why that failed, the same on all ranks, or None.
        """
        held = [found[tag].ranks if tag in found else () for found in self._held]
        world_size = next(found[tag].world_size for found in self._held if tag in found)
        needed = self.engine.gather(sorted(self.engine.ranks_needed(world_size)))
        wanted = [
            sorted({old for rank in members for old in needed[rank]} - set(here))
            for members, here in zip(self.disks.members, held, strict=True)
        ]
        if not any(wanted):
            return None
        own = Manifest.read(self.directory / tag) if self.disks.leads and held[self.disks.index] else None
        gathered = self.engine.gather(own)
        manifests: list[Manifest | None] = [gathered[leader] for leader in self.disks.leaders]
        copies = [
            Copy(self.disks.leaders[source], self.disks.leaders[target], _files(manifests, source, target, ranks))
            for target, missing in enumerate(wanted)
            for source, ranks in _sources(missing, held).items()
        ]
        problem = run_copies(copies, self.directory / tag, self.engine.rank, self.engine.device)
        if problem is None and self.disks.leads and (ranks := wanted[self.disks.index]):
            base = own or next(manifest for manifest in manifests if manifest is not None)
            received = [copy.files for copy in copies if copy.target == self.engine.rank]
            files = dict(own.files) if own else {}
            for part in received:
                files.update(part)
            here = sorted({*held[self.disks.index], *ranks})
            disk = {**base.info.get(DISK_KEY, {"hosts": []}), "ranks": here}
            try:
                replace(base, files=files, info={**base.info, DISK_KEY: disk}).write(self.directory / tag)
            except OSError as error:
                problem = failure_text(error, self.directory)
        return next((text for text in self.engine.gather(problem) if text), None)


def _whose(some: DiskPart, there: set[int]) -> str:
    """Return the hosts whose ranks' files are missing."""
    missing = sorted(set(range(some.world_size)) - there)
    lost = [(host, sorted({*ranks} & {*missing})) for host, ranks in some.hosts]
    hosts = [f"host {host} (ranks {', '.join(map(str, ranks[:8]))})" for host, ranks in lost if ranks]
    return ", ".join(hosts[:4]) or f"ranks {', '.join(map(str, missing[:8]))}"


def _sources(missing: Sequence[int], held: Sequence[Sequence[int]]) -> dict[int, list[int]]:
    """Return which disk sends which ranks' files: of each rank the first that has them."""
    found: dict[int, list[int]] = {}
    for rank in missing:
        found.setdefault(next(index for index, ranks in enumerate(held) if rank in ranks), []).append(rank)
    return found


def _files(
    manifests: Sequence[Manifest | None], source: int, target: int, ranks: Sequence[int]
) -> dict[str, FileRecord]:
    """Return the files of ranks, with those that all ranks share where the target has none of the checkpoint."""
    manifest = manifests[source]
    assert manifest is not None
    shared = {None} if manifests[target] is None else set()
    return {name: record for name, record in manifest.files.items() if rank_of(name) in {*ranks, *shared}}
