"""Tensor-parallel shards read as one model again: ``tp_layout.json`` says what each rank's file holds."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from statex_dist.checkpoint.formats.places import missing_text
from statex_dist.checkpoint.formats.registry import Layout
from statex_dist.checkpoint.formats.safetensors import read_header
from statex_dist.checkpoint.formats.tensor_io import Piece, Pieces, SourceFacts, TensorInfo, TensorSource
from statex_dist.checkpoint.json_file import read_json
from statex_dist.errors import CheckpointError, reason, shown


def local_info(info: TensorInfo, axis: int, ranges: Ranges) -> TensorInfo:
    """Return a tensor as one rank holds it."""
    if not info.shape:
        return info
    shape = list(info.shape)
    shape[axis] = sum(stop - start for start, stop in ranges)
    return TensorInfo(name=info.name, shape=tuple(shape), dtype=info.dtype)


def local_pieces(info: TensorInfo, axis: int, ranges: Ranges, path: Path, offset: int) -> list[Piece]:
    """Return where the parts of a tensor that one rank holds lie in its file."""
    if not info.shape:
        return [Piece(path, offset, 0, 1)]
    if axis == 1:
        (first, last), rows, width = ranges[0], info.shape[0], math.prod(info.shape[1:])
        scale = width // info.shape[1]
        return [Piece(path, offset, 0, rows, width, first * scale, last * scale)]
    row, found = math.prod(info.shape[1:]), []
    for start, stop in ranges:
        found.append(Piece(path, offset, start * row, stop * row))
        offset += (stop - start) * row * info.item_bytes
    return found


class TensorParallelSource(TensorSource):
    """Tensor-parallel shards, as one model again; values that several ranks hold are compared while they are read.

    Args:
        directory: The directory with ``tp_layout.json``.
        facts: Facts about the checkpoint; None takes them from the directory itself.

    Raises:
        CheckpointError: A file is missing or damaged, or the ranks together do not hold every tensor.
    """

    def __init__(self, directory: Path, facts: SourceFacts | None = None):
        path = directory / LAYOUT_NAME
        layout = TensorParallelLayout.read(path)
        tp, files, tensors = layout.tp, layout.files, layout.tensors
        headers = []
        for rank, file in enumerate(files):
            if not (directory / file).is_file():
                raise CheckpointError(missing_text(directory / file, LAYOUT_NAME))
            header, metadata = read_header(directory / file)
            check_place(directory / file, metadata, rank=rank, tp=tp)
            headers.append(header)
        self._pieces: dict[str, list[Piece]] = {}
        self._replicas: dict[str, list[Piece]] = {}
        infos = {}
        for name, cut in tensors.items():
            dtypes = {header[name][0].dtype for header in headers if name in header}
            if len(dtypes) != 1 or not all(name in header for header in headers):
                raise CheckpointError(f"{directory}: tensor '{name}' is missing on a rank, or of several dtypes")
            axis, ranges = cut.axis, cut.ranges
            infos[name] = TensorInfo(name=name, shape=cut.shape, dtype=dtypes.pop())
            held = []
            for rank, header in enumerate(headers):
                local, offset = header[name]
                if (wanted := local_info(infos[name], axis, ranges[rank])).shape != local.shape:
                    raise CheckpointError(
                        f"{directory / files[rank]}: tensor '{name}' has shape {local.shape}; {LAYOUT_NAME} says "
                        f"{wanted.shape}"
                    )
                held += local_pieces(infos[name], axis, ranges[rank], directory / files[rank], offset)
            self._pieces[name], self._replicas[name] = _tiled(held, infos[name], directory)
        for file, header in zip(files, headers, strict=True):
            if unknown := [name for name in header if name not in tensors]:
                raise CheckpointError(
                    f"{directory / file} holds tensor '{unknown[0]}', which {LAYOUT_NAME} does not list"
                )
        facts = facts or SourceFacts.of_directory("tp", directory)
        facts = replace(facts, info={**facts.info, "tp": tp})
        super().__init__(facts, infos, [directory / file for file in files])

    def stored_pieces(self, name: str) -> Pieces:
        """Return where a tensor lies, in the files of all ranks."""
        return self._pieces[name]

    def stored_replicas(self, name: str) -> Sequence[Piece]:
        """Return where other ranks hold the same values."""
        return self._replicas[name]


class RankSource(TensorSource):
    """One rank's file alone: the rows or columns that it holds, each as a tensor.

    Args:
        path: The file.
        rank: Whose it must be.
        tp: Number of ranks.

    Raises:
        CheckpointError: It is missing, damaged or another rank's.
    """

    def __init__(self, path: Path, *, rank: int, tp: int):
        self._header, metadata = read_header(path)
        check_place(path, metadata, rank=rank, tp=tp)
        infos = {name: info for name, (info, _) in self._header.items()}
        super().__init__(SourceFacts.of_directory("tp", path.parent), infos, [path])

    def stored_pieces(self, name: str) -> Pieces:
        """Return where a tensor lies: one run of the file."""
        info, offset = self._header[name]
        return (Piece(self.files[0], offset, 0, info.numel),)


def _tiled(held: Sequence[Piece], info: TensorInfo, where: Path) -> tuple[list[Piece], list[Piece]]:
    """Return pieces that hold every element once, and the pieces that hold elements a second time.

    Raises:
        CheckpointError: No rank holds some of the elements.
    """
    by_columns = any(piece.width > 1 for piece in held)
    order = sorted(held, key=lambda p: (p.first, p.last) if by_columns else (p.start, p.stop))
    total = order[0].width if by_columns and order else info.numel
    tiles, replicas, position = [], [], 0
    for piece in order:
        start, stop = (piece.first, piece.last) if by_columns else (piece.start, piece.stop)
        if start > position:
            break
        if stop <= position:
            if stop > start:
                replicas.append(piece)
            continue
        if start < position:
            if by_columns:
                raise CheckpointError(f"{where}: the columns of tensor '{info.name}' that the ranks hold overlap")
            skipped = (position - start) * info.item_bytes
            replicas.append(Piece(piece.path, piece.offset, start, position))
            piece = Piece(piece.path, piece.offset + skipped, position, stop)
        tiles.append(piece)
        position = stop
    if position != total:
        raise CheckpointError(f"{where}: the ranks together do not hold all of tensor '{info.name}'")
    return tiles, replicas


class TensorParallel(Layout):
    """The layout of tensor-parallel shards with ``tp_layout.json``."""

    lists_tensors = True

    @staticmethod
    def detect(directory: Path) -> bool:
        """Return whether a directory holds the table of the shards."""
        return (directory / LAYOUT_NAME).is_file()

    @staticmethod
    def read(directory: Path, facts: SourceFacts, *, describe: bool) -> TensorSource:
        """Open a directory."""
        return TensorParallelSource(directory, facts)


LAYOUT_NAME = "tp_layout.json"
LAYOUT_VERSION = 1
_MAX_LAYOUT_BYTES = 100_000_000

Ranges = Sequence[tuple[int, int]]


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorCut:
    """How ranks share one tensor.

    Attributes:
        shape: Its full shape.
        axis: 0 where they hold rows, 1 for columns.
        ranges: For each rank the ranges ``(start, stop)`` along the axis, in the order in which its file has them.
    """

    shape: tuple[int, ...]
    axis: int
    ranges: Sequence[Ranges]


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorParallelLayout:
    """The contents of the file.

    Attributes:
        tp: Number of ranks.
        files: Each rank's file.
        tensors: Every tensor by name.
    """

    tp: int
    files: list[str]
    tensors: dict[str, TensorCut]

    @classmethod
    def read(cls, path: Path) -> TensorParallelLayout:
        """Read the file.

        Raises:
            CheckpointError: It is unreadable or says what cannot be.
        """
        try:
            if path.stat().st_size > _MAX_LAYOUT_BYTES:
                raise ValueError(f"it is larger than {_MAX_LAYOUT_BYTES} bytes")
            content = read_json(path)
            if content["version"] != LAYOUT_VERSION:
                raise ValueError(f"version {shown(content['version'])}; only {LAYOUT_VERSION} is known")
            tp, files = content["tp"], [str(name) for name in content["files"]]
            if type(tp) is not int or tp != len(files) or files != [file_name(rank, tp) for rank in range(len(files))]:
                raise ValueError(f"its files are not those of {tp} ranks")
            tensors = {
                str(name): TensorCut(
                    shape=tuple(int(size) for size in entry["shape"]),
                    axis=int(entry["axis"]),
                    ranges=[[(int(start), int(stop)) for start, stop in ranges] for ranges in entry["ranges"]],
                )
                for name, entry in content["tensors"].items()
            }
            for name, cut in tensors.items():
                if not _possible(cut, tp):
                    raise ValueError(f"the ranges of tensor '{name}' are not those of {tp} ranks")
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            IndexError,
            AttributeError,
            OverflowError,
            RecursionError,
        ) as error:
            raise CheckpointError(f"{path} cannot be read: {reason(error)}") from None
        return cls(tp=tp, files=files, tensors=tensors)

    def text(self) -> str:
        """Return the contents of the file."""
        tensors = {
            name: {"shape": list(cut.shape), "axis": cut.axis, "ranges": [[list(r) for r in of] for of in cut.ranges]}
            for name, cut in self.tensors.items()
        }
        return json.dumps({"version": LAYOUT_VERSION, "tp": self.tp, "files": self.files, "tensors": tensors}) + "\n"


def file_name(rank: int, tp: int) -> str:
    """Return the name of a rank's file."""
    return f"model-tp-{rank:02d}-of-{tp:02d}.safetensors"


def place_metadata(rank: int, tp: int) -> dict[str, str]:
    """Return what the header of a rank's file says of it."""
    return {"tp_rank": str(rank), "tp_size": str(tp)}


def check_place(path: Path, metadata: dict[str, str], *, rank: int, tp: int) -> None:
    """Raise if a rank's file says in its header that it is another's.

    Raises:
        CheckpointError: It does.
    """
    expected = place_metadata(rank, tp)
    said = {key: metadata.get(key, value) for key, value in expected.items()}
    if said != expected:
        raise CheckpointError(f"{path} says that it is rank {said['tp_rank']} of {said['tp_size']}: it was renamed")


def _possible(cut: TensorCut, tp: int) -> bool:
    """Return whether ranges can be those of a tensor on ``tp`` ranks."""
    shape, axis = cut.shape, cut.axis
    if len(cut.ranges) != tp or min(shape, default=0) < 0 or axis not in range(min(max(len(shape), 1), 2)):
        return False
    size = shape[axis] if shape else 0
    inside = all(0 <= start <= stop <= size for of_rank in cut.ranges for start, stop in of_rank)
    return inside and (axis == 0 or all(len(of_rank) == 1 for of_rank in cut.ranges))
