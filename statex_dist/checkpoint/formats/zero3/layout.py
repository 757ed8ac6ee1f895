"""How ZeRO stage 3 cuts a model into flat partitions: names of the files and the arithmetic of the pieces.

A parameter of ``n`` elements on ``W`` ranks is cut into parts of ``ceil(n / W)``; rank ``r`` owns
``[r * part, min((r + 1) * part, n))`` and pads its part to full length. A rank's flat groups are its parts one after
the other, in the order of ``param_shapes``, without alignment. Padding is uninitialised memory and is never read.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from statex_dist.errors import CheckpointError

DEFAULT_SUB_GROUP_SIZE = 10**9
"""DeepSpeed's ``sub_group_size`` where the configuration does not say."""

_MODEL_FILE = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_model_states\.pt$")
_OPTIM_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt$")


def rank_file_stem(rank: int, kind: str, prefix: str = "") -> str:
    """Return the name, without ending, of a rank's file of ``model`` or ``optim`` states; optimizers' have a prefix."""
    return f"{prefix if kind == 'optim' else ''}zero_pp_rank_{rank}_mp_rank_00_{kind}_states"


@dataclass(frozen=True, kw_only=True, slots=True)
class RankFiles:
    """The two files of one rank."""

    model: Path
    optim: Path


class FlatRun(NamedTuple):
    """A run of elements that lies contiguously in one rank's flat group.

    Attributes:
        rank: Rank that holds it.
        group: Index of that rank's flat group.
        start: First element inside the group.
        target: First element inside the logical (flattened) tensor.
        numel: Number of elements.
    """

    rank: int
    group: int
    start: int
    target: int
    numel: int


def partition_size(numel: int, world_size: int) -> int:
    """Return the elements that each rank stores of a parameter, padding included."""
    return -(-numel // world_size)


def shares(numel: int, world_size: int) -> Iterator[tuple[int, int, int]]:
    """Yield ``(rank, start, stop)`` of the elements that each rank owns, of ranks that own any."""
    part = partition_size(numel, world_size)
    for rank in range(world_size):
        start, stop = rank * part, min((rank + 1) * part, numel)
        if start < stop:
            yield rank, start, stop


def looks_like_zero(directory: Path) -> bool:
    """Return whether a directory holds files of a DeepSpeed ZeRO checkpoint."""
    return directory.is_dir() and any(
        _OPTIM_FILE.match(p.name) or _MODEL_FILE.match(p.name) for p in directory.iterdir()
    )


def looks_like_stage_3(directory: Path) -> bool:
    """Return whether a directory holds files that only ZeRO stage 3 writes."""
    return any(_MODEL_FILE.match(path.name) for path in directory.iterdir())


def find_rank_files(directory: Path) -> list[RankFiles]:
    """Return the files of every rank, by rank.

    Raises:
        CheckpointError: A rank lacks a file, a rank has two, or the checkpoint is split by model parallelism.
    """
    found: dict[str, dict[int, Path]] = {"model": {}, "optim": {}}
    for path in sorted(directory.iterdir()):
        for kind, pattern in (("model", _MODEL_FILE), ("optim", _OPTIM_FILE)):
            if not (match := pattern.match(path.name)):
                continue
            if int(match[2]):
                raise CheckpointError(f"{path}: checkpoints split by model parallelism are not supported")
            if other := found[kind].get(int(match[1])):
                raise CheckpointError(f"{directory} holds two files of rank {match[1]}: {other.name} and {path.name}")
            found[kind][int(match[1])] = path
    if found["optim"] and not found["model"]:
        raise CheckpointError(f"{directory} {_not_stage_3(directory)}")
    world_size = max((*found["model"], *found["optim"]), default=-1) + 1
    for kind, files in found.items():
        if missing := [rank for rank in range(world_size) if rank not in files]:
            raise CheckpointError(
                f"{directory}: the {kind} states of rank {', '.join(map(str, missing))} are missing "
                f"(*zero_pp_rank_{missing[0]}_mp_rank_00_{kind}_states.pt)"
            )
    return [RankFiles(model=found["model"][rank], optim=found["optim"][rank]) for rank in range(world_size)]


def _not_stage_3(directory: Path) -> str:
    """Return what a directory without the model states of ranks is, and what to do."""
    if not is_stage_1_or_2(directory):
        return "holds no zero_pp_rank_*_model_states.pt: not a ZeRO stage 3 checkpoint"
    return (
        "is a checkpoint of ZeRO stage 1 or 2 (mp_rank_00_model_states.pt); only stage 3 is read. DeepSpeed's "
        "zero_to_fp32.py makes a model of it: python zero_to_fp32.py DIR OUT --safe_serialization, in the directory "
        "of latest"
    )


def is_stage_1_or_2(directory: Path) -> bool:
    """Return whether a tag is of ZeRO stage 1 or 2, where every rank has the whole model and one file holds it."""
    return (directory / "mp_rank_00_model_states.pt").is_file() and any(
        _OPTIM_FILE.match(path.name) for path in directory.iterdir()
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class FlatLayout:
    """Where every trainable parameter lies in the flat groups.

    Attributes:
        world_size: Number of ranks.
        shapes: Shape of each parameter, in flat order.
        offsets: First element of each parameter's part, counted through all flat groups of a rank.
        group_ends: Cumulative sizes of the flat groups, starting with 0.
    """

    world_size: int
    shapes: Mapping[str, tuple[int, ...]]
    offsets: Mapping[str, int]
    group_ends: tuple[int, ...]

    @classmethod
    def build(
        cls, shapes: Mapping[str, tuple[int, ...]], group_sizes: Sequence[int], world_size: int, *, where: Path
    ) -> FlatLayout:
        """Lay the parameters out and check that they fill the groups exactly.

        Args:
            shapes: Shape of each parameter, in flat order.
            group_sizes: Elements of each flat group of a rank.
            world_size: Number of ranks.
            where: Checkpoint directory, for the message.

        Raises:
            CheckpointError: The parts do not add up to the flat groups.
        """
        offsets, position = {}, 0
        for name, shape in shapes.items():
            offsets[name] = position
            position += partition_size(math.prod(shape), world_size)
        if position != sum(group_sizes):
            raise CheckpointError(
                f"{where}: {len(shapes)} parameters on {world_size} ranks need {position} elements a rank; "
                f"the flat groups hold {sum(group_sizes)}"
            )
        return cls(world_size=world_size, shapes=shapes, offsets=offsets, group_ends=(0, *accumulate(group_sizes)))

    def runs(self, name: str) -> Iterator[FlatRun]:
        """Yield the runs of a parameter, in order and without its padding."""
        numel = math.prod(self.shapes[name])
        part, first = partition_size(numel, self.world_size), self.offsets[name]
        # Every rank has its part at the same place: group, first element inside, and elements up to the group's end.
        places = []
        for group in range(bisect_right(self.group_ends, first) - 1, len(self.group_ends) - 1):
            begin, end = self.group_ends[group], self.group_ends[group + 1]
            if begin >= first + part:
                break
            start = max(first, begin)
            places.append((group, start - begin, min(end, first + part) - start))
        for rank, target, stop in shares(numel, self.world_size):
            for group, start, most in places:
                if target < stop:
                    count = min(most, stop - target)
                    yield FlatRun(rank, group, start, target, count)
                    target += count


def sub_groups(
    groups: Sequence[Mapping[str, tuple[int, ...]]], world_size: int, sub_group_size: int | None
) -> list[list[list[str]]]:
    """Cut each parameter group of an optimizer into sub-groups, as DeepSpeed does.

    A group whose parts (of one rank) have more elements than ``sub_group_size`` together is cut after the parameter
    that reaches it, so that the cuts depend on the number of ranks
    (DeepSpeed 0.19, ``runtime/zero/stage3.py``, ``_create_fp16_sub_groups``).

    Args:
        groups: Shapes of each group's parameters, by name in their order.
        world_size: Number of ranks.
        sub_group_size: The setting; None for no cuts.

    Returns:
        For each group its sub-groups: lists of names.
    """
    return [_cut(group, world_size, sub_group_size) for group in groups]


def _cut(group: Mapping[str, tuple[int, ...]], world_size: int, sub_group_size: int | None) -> list[list[str]]:
    if not group:
        return []  # all of its parameters are frozen
    sizes = {name: partition_size(math.prod(shape), world_size) for name, shape in group.items()}
    if sub_group_size is None or sub_group_size >= sum(sizes.values()):
        return [list(group)]
    result: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if filled >= sub_group_size and result[-1]:
            result.append([])
            filled = 0
        result[-1].append(name)
        filled += size
    return result
