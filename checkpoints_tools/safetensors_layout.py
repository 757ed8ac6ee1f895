"""Laying tensors out in safetensors files."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from statex_dist.checkpoint.formats.safetensors_io import SINGLE_NAME
from statex_dist.checkpoint.formats.tensor_io import TensorInfo


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
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
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
