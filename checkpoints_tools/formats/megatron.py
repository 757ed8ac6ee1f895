"""Laying out Megatron (``torch_dist``) checkpoints, which are torch distributed checkpoints.

megatron-core's ``dist_checkpointing.load`` opens what we write, for any number of ranks, and so does plain
``torch.distributed.checkpoint.load``. We need neither of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from checkpoints_tools.formats.dcp import lay_out, metadata_bytes
from checkpoints_tools.formats.registry import PlannedTarget, TargetRequest
from checkpoints_tools.formats.torch_archive import archive_bytes
from checkpoints_tools.io.config_dtype import main_dtype
from checkpoints_tools.io.journal import WrittenTensor
from checkpoints_tools.io.target import Documents, TargetPlan
from checkpoints_tools.io.tensor_stream import TensorJob
from statex_dist.checkpoint.formats.dcp.format import METADATA_NAME
from statex_dist.checkpoint.formats.dcp.reader import CHECKPOINT_CONFIG, COMMON_FILE, CONFIG_FILE
from statex_dist.checkpoint.formats.tensor_io import Piece, TensorInfo, TensorSource
from statex_dist.errors import CheckpointError
from statex_dist.models.config import ModelConfig
from statex_dist.models.megatron import (
    MegatronPart,
    has_megatron_names,
    megatron_name,
    megatron_notes,
    name_map,
    of_part,
    whole,
)

_CHECKPOINT_VERSION = 3.0  # of older ones Megatron-LM reorders queries and keys


def megatron_plan(
    source: TensorSource,
    jobs: Sequence[TensorJob],
    *,
    config: ModelConfig | None,
    max_shard_size: int,
    documents: Documents,
    info: dict[str, Any],
) -> TargetPlan:
    """Lay tensors out in a Megatron checkpoint.

    Args:
        source: Whose step goes along.
        jobs: Every tensor, in order.
        config: The model's config, which decides on names; None where it is not of one of our families.
        max_shard_size: Bytes of values per file; the parts of a tensor stay in one file.
        documents: Makes the JSON files (``config.json`` among them) when all files are written.
        info: Facts for the manifest.

    Raises:
        CheckpointError: A tensor has no name there, is missing, or has a dtype that torch's storages lack.
    """
    parts = _parts_of([job.info for job in jobs], config)
    layout = lay_out([[of_part(job.info, p) for p in parts[job.info.name]] for job in jobs], max_shard_size)
    metadata = metadata_bytes(layout.tensors)
    step = source.facts.info.get("step") or 0
    common = archive_bytes(Path(COMMON_FILE).stem, {"checkpoint_version": _CHECKPOINT_VERSION, "iteration": step})

    def places(job: TensorJob) -> list[Piece]:
        row = math.prod(job.info.shape[1:])
        return [Piece(*layout.values[p.name], p.start * row, p.stop * row) for p in parts[job.info.name]]

    def with_metadata(written: Mapping[str, WrittenTensor]) -> dict[str, Any]:
        own = {COMMON_FILE: common, METADATA_NAME: metadata, CONFIG_FILE: CHECKPOINT_CONFIG}
        return {**documents(written), **own}

    return TargetPlan(
        kind="megatron",
        files=layout.files,
        jobs=jobs,
        places=places,
        documents=with_metadata,
        info={**info, "megatron_names": config is not None and has_megatron_names(config)},
    )


def _parts_of(infos: Sequence[TensorInfo], config: ModelConfig | None) -> dict[str, tuple[MegatronPart, ...]]:
    """Return the parts of every tensor that is written, by our name."""
    table = name_map(config) if config is not None else {}
    found = {}
    for info in infos:
        if info.name in table:
            found[info.name] = table[info.name]
            rows = found[info.name][-1].stop
            if rows != (info.shape[0] if info.shape else 1):
                raise CheckpointError(f"tensor '{info.name}' has shape {list(info.shape)}; {rows} rows are expected")
        else:
            # The head of a tied model, or what the family's layout does not list.
            renamed = config is not None and has_megatron_names(config)
            name = megatron_name(config, info.name) if config is not None and renamed else info.name
            found[info.name] = (whole(name, info.shape),)
    if missing := [name for name in table if name not in found]:
        raise CheckpointError(f"tensor '{missing[0]}' is missing: --to megatron needs every tensor")
    return found


class Megatron:
    """The layout of Megatron (``torch_dist``), written."""

    @staticmethod
    def plan_target(request: TargetRequest) -> PlannedTarget:
        """Lay a model out; one of no known family keeps its names."""
        jobs = request.jobs()
        documents = request.documents(main_dtype(job.info for job in jobs))
        plan = megatron_plan(
            request.source,
            jobs,
            config=request.config,
            max_shard_size=request.write.max_shard_size,
            documents=lambda _: documents,
            info=request.info,
        )
        return PlannedTarget(plan=plan, notes=megatron_notes(request.config))
