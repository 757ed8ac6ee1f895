"""Tensor-parallel shards: one safetensors file a rank, and ``tp_layout.json``, which says what each rank holds.

Which rows or columns of a tensor belong together is written in ``models/<family>/layout.py`` (an equal cut of Mamba2's
``in_proj`` would tear z, x, B, C and dt apart); what each rank got is written into the layout file, so that merging
needs no knowledge of the family.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from checkpoints_tools.journal import WrittenTensor
from checkpoints_tools.safetensors_io import lay_out_file, read_header
from checkpoints_tools.target import Documents, TargetPlan
from checkpoints_tools.target_writer import TargetFile
from checkpoints_tools.tensor_io import Piece, Pieces, SourceFacts, TensorInfo, TensorSource
from checkpoints_tools.transfer import TensorJob
from statex_dist.checkpoint.tp_layout import (
    LAYOUT_NAME,
    LAYOUT_VERSION,
    Ranges,
    TensorParallelLayout,
    check_place,
    file_name,
)
from statex_dist.errors import CheckpointError, ConfigError
from statex_dist.models.config import ModelConfig
from statex_dist.models.kinds import family_of
from statex_dist.models.layout import shard_ranges

logger = logging.getLogger(__name__)


def tp_plan(
    jobs: Sequence[TensorJob], config: ModelConfig, tp: int, *, documents: Documents, info: dict[str, Any]
) -> TargetPlan:
    """Lay tensors out for ``tp`` tensor-parallel ranks.

    Args:
        jobs: Every tensor, in order. Those that the family does not know are held by every rank.
        config: The model's config.
        tp: Number of ranks.
        documents: Makes the JSON files when the weights are written.
        info: Facts for the manifest.

    Raises:
        ConfigError: So many ranks cannot share the model.
    """
    specs = family_of(config.MODEL_TYPE).tensors(config)
    if strangers := [job.info.name for job in jobs if job.info.name not in specs]:
        logger.warning("%d tensors that %s does not know are held by every rank", len(strangers), config.MODEL_TYPE)
    cuts: dict[str, tuple[int, list[Ranges]]] = {}
    for job in jobs:
        spec, whole = specs.get(job.info.name), [(0, job.info.shape[0])] if job.info.shape else []
        if spec is None:
            cuts[job.info.name] = 0, [whole] * tp
        else:
            cuts[job.info.name] = spec.axis, [shard_ranges(spec, job.info.name, tp, rank) for rank in range(tp)]
    layouts, starts = [], []
    for rank in range(tp):
        local = [
            _local(job.info, axis, of_ranks[rank]) for job, (axis, of_ranks) in zip(jobs, cuts.values(), strict=True)
        ]
        file = lay_out_file(file_name(rank, tp), local, {"tp_rank": str(rank), "tp_size": str(tp)})
        layouts.append(file)
        starts.append(file.offsets())

    def places(job: TensorJob) -> list[Piece]:
        axis, ranges = cuts[job.info.name]
        return [
            piece
            for rank in range(tp)
            for piece in _pieces(job.info, axis, ranges[rank], Path(layouts[rank].file), starts[rank][job.info.name])
        ]

    table = {
        "version": LAYOUT_VERSION,
        "tp": tp,
        "files": [layout.file for layout in layouts],
        "tensors": {
            job.info.name: {
                "shape": list(job.info.shape),
                "axis": cuts[job.info.name][0],
                "ranges": [[list(piece) for piece in ranges] for ranges in cuts[job.info.name][1]],
            }
            for job in jobs
        },
    }

    def with_table(written: Mapping[str, WrittenTensor]) -> dict[str, Any]:
        return {**documents(written), LAYOUT_NAME: json.dumps(table) + "\n"}

    return TargetPlan(
        kind="tp",
        files=[TargetFile(name=layout.file, size=layout.size, header=layout.header) for layout in layouts],
        jobs=jobs,
        places=places,
        documents=with_table,
        info={**info, "tp": tp},
    )


def _local(info: TensorInfo, axis: int, ranges: Ranges) -> TensorInfo:
    """Return a tensor as one rank holds it."""
    if not info.shape:
        return info
    shape = list(info.shape)
    shape[axis] = sum(stop - start for start, stop in ranges)
    return TensorInfo(name=info.name, shape=tuple(shape), dtype=info.dtype)


def _pieces(info: TensorInfo, axis: int, ranges: Ranges, path: Path, offset: int) -> list[Piece]:
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
        facts: What is known of it besides; None for what the directory itself tells.

    Raises:
        CheckpointError: A file is missing or damaged, or the ranks together do not hold every tensor.
    """

    def __init__(self, directory: Path, facts: SourceFacts | None = None):
        path = directory / LAYOUT_NAME
        layout = TensorParallelLayout.read(path)
        tp, files, tensors = layout.tp, layout.files, layout.tensors
        headers = []
        for rank, file in enumerate(files):
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
                if (wanted := _local(infos[name], axis, ranges[rank])).shape != local.shape:
                    raise CheckpointError(
                        f"{directory / files[rank]}: tensor '{name}' has shape {local.shape}; {LAYOUT_NAME} says "
                        f"{wanted.shape}"
                    )
                held += _pieces(infos[name], axis, ranges[rank], directory / files[rank], offset)
            self._pieces[name], self._replicas[name] = _tiled(held, infos[name], directory)
        for file, header in zip(files, headers, strict=True):
            if unknown := [name for name in header if name not in tensors]:
                raise CheckpointError(
                    f"{directory / file} holds tensor '{unknown[0]}', which {LAYOUT_NAME} does not list"
                )
        facts = facts or SourceFacts.of_directory("tp", directory)
        facts = replace(facts, info={**facts.info, "tp": tp})
        super().__init__(facts, infos, [directory / file for file in files])

    def pieces(self, name: str) -> Pieces:
        """Return where a tensor lies, in the files of all ranks."""
        return self._pieces[name]

    def replicas(self, name: str) -> Sequence[Piece]:
        """Return where other ranks hold the same values."""
        return self._replicas[name]


def _tiled(held: Sequence[Piece], info: TensorInfo, where: Path) -> tuple[list[Piece], list[Piece]]:
    """Return pieces that hold every element once, and those that hold some again.

    Raises:
        CheckpointError: Elements are held by nobody.
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


def check_tp(tp: int | None) -> int:
    """Return the number of tensor-parallel ranks that ``--tp`` asks for.

    Raises:
        ConfigError: None, or not a number from 1.
    """
    if tp is None or tp < 1:
        raise ConfigError(f"--to tp needs --tp, a whole number from 1; not {tp}")
    return tp
