"""Laying out a Hugging Face model directory: safetensors, their index, ``config.json`` and what goes along."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from checkpoints_tools.journal import WrittenTensor
from checkpoints_tools.safetensors_layout import index_of, lay_out
from checkpoints_tools.target import Documents, TargetPlan
from checkpoints_tools.target_writer import TargetFile
from checkpoints_tools.transfer import TensorJob
from statex_dist.checkpoint.dtypes import TORCH_NAMES
from statex_dist.checkpoint.formats.safetensors_io import INDEX_NAME, SafetensorsSource
from statex_dist.checkpoint.formats.tensor_io import Piece, TensorSource


def with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Return a ``config.json`` that names the dtype in which the weights are stored."""
    key = "dtype" if "dtype" in config and "torch_dtype" not in config else "torch_dtype"
    return {**config, key: TORCH_NAMES[dtype]}


def hf_plan(
    source: TensorSource,
    jobs: Sequence[TensorJob],
    *,
    max_shard_size: int,
    documents: Documents,
    info: dict[str, Any],
) -> TargetPlan:
    """Lay tensors out in safetensors files.

    Args:
        source: Whose safetensors metadata goes along.
        jobs: Every tensor, in order.
        max_shard_size: Bytes of values per file.
        documents: Makes the JSON files (``config.json`` among them) when all files are written.
        info: Facts for the manifest.
    """
    metadata = source.metadata if isinstance(source, SafetensorsSource) else {}
    shards = lay_out([job.info for job in jobs], max_shard_size, metadata)
    places = {
        name: Piece(Path(shard.file), offset, 0, numel)
        for shard in shards
        for (name, offset), numel in zip(shard.offsets().items(), (t.numel for t in shard.tensors), strict=True)
    }
    by_name = {job.info.name: job for job in jobs}
    index = {INDEX_NAME: index_of(shards)} if len(shards) > 1 else {}

    def with_index(written: Mapping[str, WrittenTensor]) -> dict[str, Any]:
        return {**documents(written), **index}

    return TargetPlan(
        kind="hf",
        files=[TargetFile(name=shard.file, size=shard.size, header=shard.header) for shard in shards],
        jobs=[by_name[tensor.name] for shard in shards for tensor in shard.tensors],
        places=lambda job: (places[job.info.name],),
        documents=with_index,
        info=info,
    )
