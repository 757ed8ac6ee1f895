"""Tensor-parallel shards: one safetensors file a rank, and ``tp_layout.json``, which says what each rank holds.

Which rows or columns of a tensor belong together is written in ``models/<family>`` (an equal cut of Mamba2's
``in_proj`` would tear z, x, B, C and dt apart); what each rank got is written into the layout file, so that merging
needs no knowledge of the family.
"""

from __future__ import annotations

import logging
from pathlib import Path

from checkpoints_tools.formats.safetensors import lay_out_file
from checkpoints_tools.formats.targets import PlannedTarget, TargetRequest
from checkpoints_tools.io.documents import main_dtype
from checkpoints_tools.io.target import TargetPlan
from checkpoints_tools.io.target_file import TargetFile
from checkpoints_tools.io.tensor_stream import TensorJob
from statex_dist.checkpoint.formats.tensor_io import Piece, TensorInfo
from statex_dist.checkpoint.formats.tensor_parallel import (
    LAYOUT_NAME,
    TensorCut,
    TensorParallel,
    TensorParallelLayout,
    file_name,
    local_info,
    local_pieces,
    place_metadata,
)
from statex_dist.errors import ConfigError
from statex_dist.models.layout import TensorSpec, shard_ranges
from statex_dist.models.registry import family_of

logger = logging.getLogger(__name__)


def check_tp(tp: int | None) -> int:
    """Return the number of tensor-parallel ranks that ``--tp`` asks for.

    Raises:
        ConfigError: None, or not a number from 1.
    """
    if tp is None or tp < 1:
        raise ConfigError(f"--to tp needs --tp, a whole number from 1; not {tp}")
    return tp


class TensorParallelTarget(TensorParallel):
    """The layout of tensor-parallel shards, written."""

    @staticmethod
    def plan_target(request: TargetRequest) -> PlannedTarget:
        """Lay out a model of a known family; every rank holds the tensors that the family does not know.

        Raises:
            ConfigError: The model cannot be split over this number of ranks.
        """
        jobs = request.jobs()
        documents = request.documents(main_dtype(job.info for job in jobs))
        config, tp = request.family_config("tp"), check_tp(request.tp)
        specs = family_of(config.MODEL_TYPE).tensors(config)
        if unknown := [job.info.name for job in jobs if job.info.name not in specs]:
            logger.warning("%d tensors that %s does not know are held by every rank", len(unknown), config.MODEL_TYPE)
        cuts = {job.info.name: _cut(job.info, specs.get(job.info.name), tp) for job in jobs}
        files, starts = [], []
        for rank in range(tp):
            held = [local_info(job.info, (c := cuts[job.info.name]).axis, c.ranges[rank]) for job in jobs]
            files.append(lay_out_file(file_name(rank, tp), held, place_metadata(rank, tp)))
            starts.append(files[-1].offsets())

        def places(job: TensorJob) -> list[Piece]:
            name, found = job.info.name, []
            for rank, file in enumerate(files):
                ranges = cuts[name].ranges[rank]
                found += local_pieces(job.info, cuts[name].axis, ranges, Path(file.file), starts[rank][name])
            return found

        layout = TensorParallelLayout(tp=tp, files=[file.file for file in files], tensors=cuts)
        documents |= {LAYOUT_NAME: layout.text()}
        plan = TargetPlan(
            kind="tp",
            files=[TargetFile(name=file.file, size=file.size, header=file.header) for file in files],
            jobs=jobs,
            places=places,
            documents=lambda _: documents,
            info={**request.info, "tp": tp},
        )
        return PlannedTarget(plan=plan)


def _cut(info: TensorInfo, spec: TensorSpec | None, tp: int) -> TensorCut:
    """Return how ranks share a tensor; one that the family does not know is whole on each."""
    if spec is None:
        return TensorCut(shape=info.shape, axis=0, ranges=[[(0, info.shape[0])] if info.shape else []] * tp)
    ranges = [shard_ranges(spec, info.name, tp, rank) for rank in range(tp)]
    return TensorCut(shape=info.shape, axis=spec.axis, ranges=ranges)
