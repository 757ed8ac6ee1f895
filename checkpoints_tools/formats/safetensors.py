"""Laying out a Hugging Face model directory: safetensors, their index, ``config.json`` and what goes along."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints_tools.formats.targets import PlannedTarget, TargetRequest
from checkpoints_tools.io.journal import WrittenTensor
from checkpoints_tools.io.target import TargetPlan
from checkpoints_tools.io.target_file import TargetFile
from statex_dist.checkpoint.formats.safetensors import INDEX_NAME, SINGLE_NAME, Safetensors, SafetensorsSource
from statex_dist.checkpoint.formats.tensor_io import Piece, TensorInfo

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardLayout:
    """One safetensors file to be written.

    Attributes:
        file: Its name.
        header: Everything before the values.
        tensors: The tensors in the order of their values, without gaps.
    """

    file: str
    header: bytes
    tensors: tuple[TensorInfo, ...]

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self.header) + sum(info.nbytes for info in self.tensors)

    def offsets(self) -> dict[str, int]:
        """Return the byte at which each tensor begins."""
        starts = itertools.accumulate((info.nbytes for info in self.tensors), initial=len(self.header))
        return {info.name: start for info, start in zip(self.tensors, starts, strict=False)}


def lay_out(
    infos: Sequence[TensorInfo], max_shard_size: int, metadata: Mapping[str, str] | None = None
) -> list[ShardLayout]:
    """Lay tensors out in files of at most ``max_shard_size`` bytes of values; a larger tensor gets one of its own.

    Args:
        infos: Every tensor, in order.
        max_shard_size: Bytes of values per file.
        metadata: Entries of each header's ``__metadata__`` beside ``format``.
    """
    shards: list[list[TensorInfo]] = [[]]
    filled = 0
    for info in infos:
        if shards[-1] and filled + info.nbytes > max_shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(info)
        filled += info.nbytes
    names = (
        [SINGLE_NAME]
        if len(shards) == 1
        else [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    )
    return [lay_out_file(name, shard, metadata or {}) for name, shard in zip(names, shards, strict=True)]


def lay_out_file(file: str, shard: Sequence[TensorInfo], metadata: Mapping[str, str]) -> ShardLayout:
    """Lay tensors out in one file.

    Args:
        file: Its name.
        shard: The tensors.
        metadata: Entries of the header's ``__metadata__`` beside ``format``.
    """
    # Whatever the source's files said ("np", "tf", "mlx"): transformers refuses some of these and converts others.
    header: dict[str, Any] = {"__metadata__": {**metadata, "format": "pt"}}
    # Wide elements first, as the safetensors library does: then every tensor is aligned to its element size.
    tensors = tuple(sorted(shard, key=lambda info: -info.item_bytes))
    position = 0
    for info in tensors:
        end = position + info.nbytes
        header[info.name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return ShardLayout(file=file, header=len(text).to_bytes(8, "little") + text, tensors=tensors)


def index_of(shards: Sequence[ShardLayout]) -> dict[str, Any]:
    """Return the contents of the index file of several shards."""
    weight_map = {info.name: shard.file for shard in shards for info in shard.tensors}
    total = sum(info.nbytes for shard in shards for info in shard.tensors)
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


class SafetensorsTarget(Safetensors):
    """The layout of Hugging Face directories with safetensors, written."""

    @staticmethod
    def plan_target(request: TargetRequest) -> PlannedTarget:
        """Lay a directory out that transformers opens, where that is possible."""
        jobs = request.jobs()
        documents, notes = request.export(jobs)
        source, metadata = request.source, {}
        if isinstance(source, SafetensorsSource):
            metadata = source.metadata
            if names := sorted(source.contradictory - {"format"}):
                logger.warning("the source's files differ in metadata %s, which is left out", ", ".join(names))
        shards = lay_out([job.info for job in jobs], request.write.max_shard_size, metadata)
        places = {
            name: Piece(Path(shard.file), offset, 0, numel)
            for shard in shards
            for (name, offset), numel in zip(shard.offsets().items(), (t.numel for t in shard.tensors), strict=True)
        }
        by_name = {job.info.name: job for job in jobs}
        index = {INDEX_NAME: index_of(shards)} if len(shards) > 1 else {}

        def with_index(written: Mapping[str, WrittenTensor]) -> dict[str, Any]:
            return {**documents(written), **index}

        plan = TargetPlan(
            kind="hf",
            files=[TargetFile(name=shard.file, size=shard.size, header=shard.header) for shard in shards],
            jobs=[by_name[tensor.name] for shard in shards for tensor in shard.tensors],
            places=lambda job: (places[job.info.name],),
            documents=with_index,
            info=request.info,
        )
        return PlannedTarget(plan=plan, notes=notes)
