"""How ZeRO stage 3 cuts a model into flat partitions: names of the files and the arithmetic of the pieces.

A parameter of ``n`` elements on ``W`` ranks is cut into parts of ``ceil(n / W)``; rank ``r`` owns
``[r * part, min((r + 1) * part, n))`` and pads its part to full length. A rank's flat groups are its parts one after
the other, in the order of ``param_shapes``, without alignment. Padding is uninitialised memory and is never read.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from statex_dist.checkpoint.layout import tag_files
from statex_dist.errors import CheckpointError

DEFAULT_SUB_GROUP_SIZE = 10**9
"""DeepSpeed's ``sub_group_size`` where the configuration does not say."""

WHOLE_MODEL_NAME = "mp_rank_00_model_states.pt"
"""The file with the whole model, which stages 0 to 2 have in place of the ranks' model states."""

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


def shares(numel: int, world_size: int, first: int = 0, last: int | None = None) -> Iterator[tuple[int, int, int]]:
    """Yield ``(rank, start, stop)`` of what each rank owns of the elements ``first .. last``, of ranks that own any."""
    part, last = partition_size(numel, world_size), numel if last is None else last
    for rank in range(first // part, -(-last // part)) if first < last else ():
        yield rank, max(rank * part, first), min((rank + 1) * part, last)


def looks_like_zero(directory: Path) -> bool:
    """Return whether a directory holds files of a DeepSpeed ZeRO checkpoint whose model is not whole in one file."""
    if not directory.is_dir() or (directory / WHOLE_MODEL_NAME).is_file():
        return False
    return any(_OPTIM_FILE.match(p.name) or _MODEL_FILE.match(p.name) for p in tag_files(directory))


def looks_like_stage_3(directory: Path) -> bool:
    """Return whether a directory holds files that only ZeRO stage 3 writes."""
    return any(_MODEL_FILE.match(path.name) for path in tag_files(directory))


def find_rank_files(directory: Path, paths: Iterable[Path] | None = None) -> list[RankFiles]:
    """Return the files of every rank, by rank.

    Args:
        directory: The checkpoint.
        paths: Its files, where they are known; nothing is listed then.

    Raises:
        CheckpointError: A rank lacks a file, a rank has two, or the checkpoint is split by model parallelism.
    """
    found: dict[str, dict[int, Path]] = {"model": {}, "optim": {}}
    for path in tag_files(directory) if paths is None else paths:
        for kind, pattern in (("model", _MODEL_FILE), ("optim", _OPTIM_FILE)):
            if not (match := pattern.match(path.name)):
                continue
            if int(match[2]):
                raise CheckpointError(f"{path}: checkpoints split by model parallelism are not supported")
            if other := found[kind].get(int(match[1])):
                raise CheckpointError(f"{directory} holds two files of rank {match[1]}: {other.name} and {path.name}")
            found[kind][int(match[1])] = path
    if found["optim"] and not found["model"]:
        raise CheckpointError(
            f"{directory} holds no zero_pp_rank_*_model_states.pt (of stage 3) and no {WHOLE_MODEL_NAME} (of stages 0 "
            "to 2): it is not a complete ZeRO checkpoint"
        )
    world_size = max((*found["model"], *found["optim"]), default=-1) + 1
    for kind, files in found.items():
        if missing := [rank for rank in range(world_size) if rank not in files]:
            raise CheckpointError(
                f"{directory}: the {kind} states of rank {', '.join(map(str, missing))} are missing "
                f"(*zero_pp_rank_{missing[0]}_mp_rank_00_{kind}_states.pt)"
            )
    return [RankFiles(model=found["model"][rank], optim=found["optim"][rank]) for rank in range(world_size)]


def files_of_rank(directory: Path, names: Iterable[str], rank: int) -> RankFiles:
    """Return one rank's files, of a checkpoint whose files are known by their paths in it.

    Raises:
        CheckpointError: The rank lacks a file, or has two.
    """
    by_name = {name.rpartition("/")[2]: name for name in names}
    found = []
    for kind in ("model", "optim"):
        wanted = {f"{rank_file_stem(rank, kind, prefix)}.pt" for prefix in ("", "bf16_", "fp16_")}
        held = sorted(wanted & by_name.keys())
        if len(held) != 1:
            problem = (
                f"two files of rank {rank}: {held[0]} and {held[1]}" if held else f"no {kind} states of rank {rank}"
            )
            raise CheckpointError(f"{directory} holds {problem}")
        found.append(directory / by_name[held[0]])
    return RankFiles(model=found[0], optim=found[1])


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

    def window(self, name: str, first: int, last: int) -> Iterator[FlatRun]:
        """Yield the runs of the elements ``first .. last`` of a parameter, in order; other ranks cost nothing."""
        for rank, target, stop in shares(math.prod(self.shapes[name]), self.world_size, first, last):
            position = (
                self.offsets[name] + target - rank * partition_size(math.prod(self.shapes[name]), self.world_size)
            )
            group = bisect_right(self.group_ends, position) - 1
            while target < stop:
                begin, end = self.group_ends[group : group + 2]
                count = min(end - position, stop - target)
                if count > 0:
                    yield FlatRun(rank=rank, group=group, start=position - begin, target=target, numel=count)
                position, target, group = position + count, target + count, group + 1


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
