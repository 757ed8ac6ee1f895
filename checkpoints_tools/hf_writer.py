"""Laying out a Hugging Face model directory: safetensors, their index, ``config.json`` and what goes along."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from checkpoints_tools.journal import WrittenTensor
from checkpoints_tools.safetensors_layout import index_of, lay_out
from checkpoints_tools.target import Documents, TargetPlan
from checkpoints_tools.target_writer import TargetFile
from checkpoints_tools.transfer import TensorJob
from statex_dist.checkpoint.dtypes import FLOATS, TORCH_NAMES
from statex_dist.checkpoint.formats.safetensors_io import INDEX_NAME, SafetensorsSource
from statex_dist.checkpoint.formats.tensor_io import Piece, TensorInfo, TensorSource, natural_dtype

logger = logging.getLogger(__name__)

DTYPE_KEYS = ("dtype", "torch_dtype")
"""Where ``config.json`` names the dtype of the weights: as transformers 5 writes it, and as 4 did."""


def with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Return a ``config.json`` that names the dtype in which the weights are stored, once.

    The key is the one that the contents have; ``dtype`` where they have both, ``torch_dtype``, which every release
    reads, where they have neither.
    """
    key = next((key for key in DTYPE_KEYS if key in config), "torch_dtype")
    return {**{k: v for k, v in config.items() if k not in DTYPE_KEYS}, key: TORCH_NAMES[dtype]}


def with_one_dtype(config: dict[str, Any], source: TensorSource) -> dict[str, Any]:
    """Return a ``config.json`` with one dtype: where its two keys differ, one is left and names the stored dtype."""
    if len({config[key] for key in DTYPE_KEYS if isinstance(config.get(key), str)}) < 2:
        return config
    stored = main_dtype([replace(source.info(name), dtype=natural_dtype(source, name)) for name in source.owned()])
    return config if stored is None else with_dtype(config, stored)


def float_dtypes(infos: Iterable[TensorInfo]) -> list[str]:
    """Return the floating-point dtypes of tensors, that of most bytes first."""
    sizes: dict[str, int] = {}
    for info in infos:
        if info.dtype in FLOATS:
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
    return sorted(sizes, key=lambda dtype: (sizes[dtype], TORCH_NAMES[dtype]), reverse=True)


def main_dtype(infos: Iterable[TensorInfo]) -> str | None:
    """Return the floating-point dtype of most bytes, or None of a checkpoint without any."""
    return next(iter(float_dtypes(infos)), None)


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
        source: Whose safetensors metadata goes along, but for ``format``, which is always ``pt``.
        jobs: Every tensor, in order.
        max_shard_size: Bytes of values per file.
        documents: Makes the JSON files (``config.json`` among them) when all files are written.
        info: Facts for the manifest.
    """
    metadata = source.metadata if isinstance(source, SafetensorsSource) else {}
    if isinstance(source, SafetensorsSource) and (names := sorted(source.contradictory - {"format"})):
        logger.warning("the source's files differ in metadata %s, which is left out", ", ".join(names))
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
