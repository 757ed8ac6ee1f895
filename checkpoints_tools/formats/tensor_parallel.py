"""Tensor-parallel shards: one safetensors file a rank, and ``tp_layout.json``, which says what each rank holds.

Which rows or columns of a tensor belong together is written in ``models/<family>`` (an equal cut of Mamba2's
``in_proj`` would tear z, x, B, C and dt apart); what each rank got is written into the layout file, so that merging
needs no knowledge of the family.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from checkpoints_tools.formats.registry import PlannedTarget, TargetRequest
from checkpoints_tools.formats.safetensors import lay_out_file
from checkpoints_tools.io.config_dtype import main_dtype
from checkpoints_tools.io.journal import WrittenTensor
from checkpoints_tools.io.target import Documents, TargetPlan
from checkpoints_tools.io.target_file import TargetFile
from checkpoints_tools.io.tensor_stream import TensorJob
from statex_dist.checkpoint.formats.tensor_io import Piece
from statex_dist.checkpoint.formats.tensor_parallel import local_info, local_pieces
from statex_dist.checkpoint.tp_layout import (
    LAYOUT_NAME,
    LAYOUT_VERSION,
    Ranges,
    file_name,
)
from statex_dist.errors import ConfigError
from statex_dist.models.config import ModelConfig
from statex_dist.models.layout import shard_ranges
from statex_dist.models.registry import family_of

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
    if unknown := [job.info.name for job in jobs if job.info.name not in specs]:
        logger.warning("%d tensors that %s does not know are held by every rank", len(unknown), config.MODEL_TYPE)
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
            local_info(job.info, axis, of_ranks[rank])
            for job, (axis, of_ranks) in zip(jobs, cuts.values(), strict=True)
        ]
        file = lay_out_file(file_name(rank, tp), local, {"tp_rank": str(rank), "tp_size": str(tp)})
        layouts.append(file)
        starts.append(file.offsets())

    def places(job: TensorJob) -> list[Piece]:
        axis, ranges = cuts[job.info.name]
        files = [Path(layout.file) for layout in layouts]
        return [
            piece
            for rank in range(tp)
            for piece in local_pieces(job.info, axis, ranges[rank], files[rank], starts[rank][job.info.name])
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


def check_tp(tp: int | None) -> int:
    """Return the number of tensor-parallel ranks that ``--tp`` asks for.

    Raises:
        ConfigError: None, or not a number from 1.
    """
    if tp is None or tp < 1:
        raise ConfigError(f"--to tp needs --tp, a whole number from 1; not {tp}")
    return tp


class TensorParallel:
    """The layout of tensor-parallel shards, written."""

    @staticmethod
    def plan_target(request: TargetRequest) -> PlannedTarget:
        """Lay a model of a known family out."""
        jobs = request.jobs()
        documents = request.documents(main_dtype(job.info for job in jobs))
        config = request.family_config("tp")
        plan = tp_plan(jobs, config, check_tp(request.tp), documents=lambda _: documents, info=request.info)
        return PlannedTarget(plan=plan)
