"""Reading this rank's part of a ZeRO-3 checkpoint: its own two files, or its pieces of the files of other ranks.

A checkpoint of the same number of ranks is read file by file, each byte once: digest and contents come from the same
bytes. Of another number of ranks every new rank reads only the parts of the old ranks' flat groups that it needs. No
rank then sees a whole file; but the CRC-32 of a stretch follows from those of its parts (:mod:`formats.crc`), so each
file has one rank that checks it, and the others send it the CRCs of the parts that they have read. It reads the bytes
that no rank needed (padding, the states of ranks that are gone) and compares the CRCs with those in the file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from statex_dist.checkpoint.formats.crc import CrcLedger
from statex_dist.checkpoint.formats.piece_io import PieceReader, SourceCrcs, check_entry
from statex_dist.checkpoint.formats.tensor_io import Piece, TensorInfo
from statex_dist.checkpoint.formats.torch_archive.zip import check_small_entries, open_archive, read_directory
from statex_dist.checkpoint.formats.zero3.layout import (
    FlatLayout,
    RankFiles,
    files_of_rank,
    find_rank_files,
    partition_size,
    shares,
)
from statex_dist.checkpoint.formats.zero3.rank import (
    WEIGHTS,
    RankStates,
    base_states,
    model_states,
    open_rank,
    optim_states,
)
from statex_dist.checkpoint.formats.zero3.reader import parameter_groups
from statex_dist.checkpoint.manifest import FileRecord, Manifest
from statex_dist.engine.saved_file import SavedFile, read_tensors, torch_dtype
from statex_dist.errors import CheckpointError

CARRIED_KEY = "carried"
"""States between packs, in the client state: of one rank's share of the data."""

Runs = Mapping[str, Sequence[tuple[int, int, int]]]
"""``(start, length, crc)`` of the runs of each storage of a file that a rank has read."""

Exchange = Callable[[list[dict[str, Runs]]], list[dict[str, Runs]]]
"""Sends one value to each rank, and returns those that the ranks sent to this one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """How this run cuts its parameters.

    Attributes:
        rank: This rank.
        world_size: All ranks.
        sub_groups: Shapes of the parameters of each of the optimizer's sub-groups, by name in flat order.
        owners: The parameter group of each sub-group.
    """

    rank: int
    world_size: int
    sub_groups: Sequence[Mapping[str, tuple[int, ...]]]
    owners: Sequence[int]

    @property
    def groups(self) -> list[list[tuple[str, tuple[int, ...]]]]:
        """Names and shapes of the parameters of each parameter group that has any."""
        found: dict[int, list[tuple[str, tuple[int, ...]]]] = {}
        for owner, group in zip(self.owners, self.sub_groups, strict=True):
            found.setdefault(owner, []).extend(group.items())
        return list(found.values())

    def part(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """Return the first and the last element that this rank owns of a tensor, and the elements with padding."""
        numel = math.prod(shape)
        size = partition_size(numel, self.world_size)
        return min(self.rank * size, numel), min((self.rank + 1) * size, numel), size


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedStates:
    """The part of a checkpoint that a rank needs, in host memory.

    Attributes:
        model: Contents of the model states, frozen fragments as this run cuts them.
        flat: Master weights of each sub-group. ``[elements]`` fp32.
        states: What the optimizer keeps of each sub-group, by its names.
        groups: Names and shapes of the parameters of each sub-group (same number of ranks) or parameter group.
        world_size: Ranks that wrote it.
    """

    model: dict[str, Any]
    flat: list[torch.Tensor]
    states: list[dict[str, Any]]
    groups: list[list[tuple[str, tuple[int, ...]]]]
    world_size: int


def read_own(directory: Path, manifest: Manifest, cut: Cut) -> SavedStates:
    """Read this rank's files of a checkpoint of the same number of ranks.

    Raises:
        CheckpointError: One is missing, damaged or of another kind.
        OSError: One cannot be read.
    """
    files = files_of_rank(directory, manifest.files, cut.rank)
    model, optim = (SavedFile(path, _record(path, directory, manifest)) for path in (files.model, files.optim))
    content = model_states(model.archive, model.archive, cut.world_size)
    optimizer = optim_states(optim.archive, cut.world_size)["optimizer_state_dict"]
    _refuse_scaling(optimizer, files.optim)
    inner = base_states(optim.archive.content).get("state") or {}
    flat = optim.tensors(optimizer["fp32_flat_groups"])
    return SavedStates(
        model=model.tensors(content),
        flat=flat,
        states=[optim.tensors(inner.get(index, {})) for index in range(len(flat))],
        groups=[_named(group) for group in content["param_shapes"]],
        world_size=cut.world_size,
    )


def read_pieces(directory: Path, manifest: Manifest, cut: Cut, exchange: Exchange) -> SavedStates:
    """Read this rank's pieces of a checkpoint of another number of ranks; all ranks call it together.

    Raises:
        CheckpointError: A file is missing, damaged or of another kind. Only one of the ranks may find that.
        OSError: One cannot be read.
    """
    problem: Exception | None = None
    noted: list[dict[str, Runs]] = [{} for _ in range(cut.world_size)]
    files = find_rank_files(directory, [directory / name for name in manifest.files])
    try:
        found, crcs = _read_pieces(directory, files, cut)
        owners = {path: rank for rank, pair in enumerate(files) for path in (pair.model, pair.optim)}
        for path, runs in ((Path(name), runs) for name, runs in crcs.runs().items()):
            noted[_checker(owners[path], len(files), cut.world_size)][path.relative_to(directory).as_posix()] = runs
    except Exception as error:  # a damaged file may raise any; the others wait for this rank's CRCs
        problem = error
    received = exchange(noted)
    if problem is not None:
        raise problem
    for rank in (r for r in range(len(files)) if _checker(r, len(files), cut.world_size) == cut.rank):
        for path in (files[rank].model, files[rank].optim):
            name = path.relative_to(directory).as_posix()
            _check_whole(path, _record(path, directory, manifest), [sent[name] for sent in received if name in sent])
    return found


def needed_ranks(cut: Cut, shapes: Iterable[Sequence[int]], world_size: int) -> set[int]:
    """Return the old ranks, of ``world_size``, whose files a rank opens in :func:`read_pieces`.

    Args:
        cut: This run.
        shapes: Shapes of all parameters, frozen ones too.
        world_size: Ranks that wrote the checkpoint.
    """
    checked = {rank for rank in range(world_size) if _checker(rank, world_size, cut.world_size) == cut.rank}
    return _held_by(cut, shapes, world_size) | checked | {cut.rank % world_size}


def _held_by(cut: Cut, shapes: Iterable[Sequence[int]], world_size: int) -> set[int]:
    """Return the old ranks that hold any of this rank's parts."""
    held: set[int] = set()
    for shape in shapes:
        start, stop, _ = cut.part(shape)
        held.update(rank for rank, _, _ in shares(math.prod(shape), world_size, start, stop))
    return held


def _checker(rank: int, old: int, new: int) -> int:
    """Return the new rank that compares an old rank's files with the manifest: one that needs most of them itself."""
    return rank * new // old


def _record(path: Path, directory: Path, manifest: Manifest) -> FileRecord:
    return manifest.files[path.relative_to(directory).as_posix()]


def _named(group: Mapping[str, Sequence[int]]) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(shape)) for name, shape in group.items()]


def _refuse_scaling(optimizer: Mapping[str, Any], path: Path) -> None:
    if optimizer.get("dynamic_loss_scale"):
        raise CheckpointError(f"{path} is of a run in fp16 with a loss scale; such a run cannot be continued here")


def _read_pieces(directory: Path, files: Sequence[RankFiles], cut: Cut) -> tuple[SavedStates, SourceCrcs]:
    """Return this rank's states, and the CRCs of the bytes that were read of each file."""
    world_size, nearest = len(files), cut.rank % len(files)
    first = open_archive(files[nearest].model), open_archive(files[nearest].optim)
    content, optim = model_states(first[0], first[0], world_size), optim_states(first[1], world_size)
    _refuse_scaling(optim["optimizer_state_dict"], files[nearest].optim)
    shapes = {name: tuple(shape) for group in content["param_shapes"] for name, shape in group.items()}
    groups = [[(n, shapes[n]) for n in group] for group in parameter_groups(content, optim, first[1].path) if group]
    left_out = (CARRIED_KEY, "frozen_param_fragments")
    model = {key: read_tensors(first[0], value) for key, value in content.items() if key not in left_out}
    crcs = SourceCrcs(())
    if groups != cut.groups:
        return SavedStates(model=model, flat=[], states=[], groups=groups, world_size=world_size), crcs
    sizes = [group.numel for group in optim["optimizer_state_dict"]["fp32_flat_groups"]]
    layout = FlatLayout.build(shapes, sizes, world_size, where=directory)
    frozen = {name: tuple(shape) for name, shape in (content.get("frozen_param_shapes") or {}).items()}
    needed = _held_by(cut, [*shapes.values(), *frozen.values()], world_size) | {nearest}
    ranks = {rank: open_rank(files[rank], first, world_size) for rank in sorted(needed)}
    crcs = SourceCrcs(archive for rank in ranks.values() for archive in rank.archives)
    source = _RankPieces(ranks, layout, cut, crcs)
    try:
        states = [name for name in ranks[nearest].flat if name != WEIGHTS]
        inner = base_states(optim).get("state") or {}
        owner = {name: index for index, group in enumerate(content["param_shapes"]) for name in group}
        found = SavedStates(
            model=model,
            flat=[source.flat(group, WEIGHTS) for group in cut.sub_groups],
            states=[
                {
                    **read_tensors(
                        first[1], {k: v for k, v in inner.get(owner[next(iter(group))], {}).items() if k not in states}
                    ),
                    **{name: source.flat(group, name) for name in states},
                }
                for group in cut.sub_groups
            ],
            groups=groups,
            world_size=world_size,
        )
        if frozen:
            held = content["frozen_param_fragments"]
            infos = [TensorInfo(name=name, shape=shape, dtype=held[name].dtype) for name, shape in frozen.items()]
            model["frozen_param_fragments"] = {info.name: source.frozen(info) for info in infos}
    finally:
        source.close()
    return found, crcs


class _RankPieces:
    """Reads parts of tensors out of the files of old ranks.

    Args:
        ranks: The old ranks that hold any of it.
        layout: How the checkpoint is cut.
        cut: How this run is cut.
        crcs: Notes what is read.
    """

    def __init__(self, ranks: Mapping[int, RankStates], layout: FlatLayout, cut: Cut, crcs: SourceCrcs):
        self._ranks, self._layout, self._cut = ranks, layout, cut
        states = {archive.path: archive.state for rank in ranks.values() for archive in rank.archives}
        self._reader = PieceReader(states, crcs)

    def flat(self, group: Mapping[str, tuple[int, ...]], state: str) -> torch.Tensor:
        """Return this rank's flat group of the weights, or of an optimizer's state; padding is zero."""
        parts = [self._cut.part(shape) for shape in group.values()]
        flat, position = torch.zeros(sum(size for *_, size in parts)), 0
        for name, (start, stop, size) in zip(group, parts, strict=True):
            pieces = list(self._flat_pieces(name, start, stop, state))
            self._read(TensorInfo(name=name, shape=group[name], dtype="F32"), flat[position:], start, stop, pieces)
            position += size
        return flat

    def _flat_pieces(self, name: str, start: int, stop: int, state: str) -> Iterator[Piece]:
        for run in self._layout.window(name, start, stop):
            held = self._ranks[run.rank].flat[state][run.group]
            yield Piece(held.path, held.offset + 4 * run.start, run.target, run.target + run.numel)

    def frozen(self, info: TensorInfo) -> torch.Tensor:
        """Return this rank's fragment of a frozen parameter."""
        start, stop, size = self._cut.part(info.shape)
        old = partition_size(info.numel, self._layout.world_size)
        pieces = []
        for rank, begin, end in shares(info.numel, self._layout.world_size, start, stop):
            held = self._ranks[rank].frozen[info.name]
            pieces.append(Piece(held.path, held.offset + info.item_bytes * (begin - rank * old), begin, end))
        fragment = torch.zeros(size, dtype=torch_dtype(info.dtype))
        self._read(info, fragment, start, stop, pieces)
        return fragment

    def _read(self, info: TensorInfo, target: torch.Tensor, start: int, stop: int, pieces: Sequence[Piece]) -> None:
        if stop > start:
            self._reader.read(pieces, info, start, target[: stop - start].view(torch.uint8).numpy())

    def close(self) -> None:
        """Close the files."""
        self._reader.close()


def _check_whole(path: Path, record: FileRecord, noted: Sequence[Runs]) -> None:
    """Compare a file with its record by the CRCs of the parts that the ranks have read; the rest is read now.

    Raises:
        CheckpointError: It is damaged.
        OSError: It cannot be read.
    """
    record.check_size(path)
    if record.directory_xxh3_128 is None:
        record.check(path)
        return
    record.check_directory(path)
    check_small_entries(path)
    for name, entry in read_directory(path)[1].items():
        if not name.startswith("data/") or not entry.size:
            continue
        ledger = CrcLedger()
        for runs in noted:
            for run in runs.get(name, ()):
                ledger.note_crc(*run)
        check_entry(path, name, entry, ledger)
