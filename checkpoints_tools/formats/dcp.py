"""Writing torch distributed checkpoints (DCP): each tensor is one chunk, which readers cut for any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from checkpoints_tools.formats.targets import PlannedTarget, TargetRequest
from checkpoints_tools.formats.torch_archive import ArchiveLayout, archive_bytes, dumps
from checkpoints_tools.io.documents import main_dtype
from checkpoints_tools.io.target import TargetPlan
from checkpoints_tools.io.target_file import TargetFile
from checkpoints_tools.io.tensor_stream import TensorJob
from statex_dist.checkpoint.dtypes import TORCH_NAMES
from statex_dist.checkpoint.formats.dcp.format import (
    CHUNK,
    INDEX,
    METADATA,
    METADATA_NAME,
    PACKAGE,
    PLACE,
    PROPERTIES,
    TENSOR,
    Chunk,
    StoredTensor,
)
from statex_dist.checkpoint.formats.dcp.reader import CHECKPOINT_CONFIG, COMMON_FILE, CONFIG_FILE, Dcp
from statex_dist.checkpoint.formats.tensor_io import Piece, TensorInfo
from statex_dist.checkpoint.formats.torch_archive.pickle import STORAGES, Remembered, Size, named, new_tensor
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

_VERSION = "1.0.0"
_ALIGNMENT = 64


def metadata_bytes(tensors: Mapping[str, StoredTensor]) -> bytes:
    """Return the ``.metadata`` that lists tensors; it names no path of this machine, as torch's own would."""
    memory_format = named(f"{PACKAGE}.metadata._MEM_FORMAT_ENCODING")(0)
    strided = named("torch.serialization._get_layout")("torch.strided")
    entries: dict[str, Any] = {}
    places: dict[Any, Any] = {}
    for name, tensor in tensors.items():
        dtype = named(f"torch.{TORCH_NAMES[tensor.info.dtype]}")
        chunks = [_made(CHUNK, {"offsets": Size(c.offsets), "sizes": Size(c.sizes)}) for c in tensor.chunks]
        properties = _made(PROPERTIES, (dtype, strided, False, memory_format, False))
        entries[name] = _made(TENSOR, {"properties": properties, "size": Size(tensor.info.shape), "chunks": chunks})
        for number, chunk in enumerate(tensor.chunks):
            index = _made(INDEX, {"fqn": name, "index": number, "offset": Size(chunk.offsets)})
            place = {"relative_path": chunk.file, "offset": chunk.offset, "length": chunk.length}
            places[index] = _made(PLACE, place)
    fields = {
        "state_dict_metadata": entries,
        "planner_data": {name: (name,) for name in tensors},
        "storage_data": places,
        "storage_meta": None,
        "version": _VERSION,
    }
    return dumps(_made(METADATA, fields))


def _made(name: str, state: Any) -> Remembered:
    """Return an object that the reader makes without calling its class, and then gives its state."""
    made = named(name)()
    made.by_call, made.state = False, state
    return made


@lru_cache(maxsize=4096)
def _archive(dtype: str, shape: tuple[int, ...]) -> ArchiveLayout:
    """Return the archive of one tensor."""
    info = TensorInfo(name="", shape=shape, dtype=dtype)
    return ArchiveLayout.build("archive", dumps(new_tensor("0", dtype, shape)), {"0": info.nbytes})


@dataclass(frozen=True, kw_only=True, slots=True)
class DcpLayout:
    """Files that are to be written.

    Attributes:
        files: The ``.distcp`` files.
        tensors: Every tensor, one chunk each, by name.
        values: File and byte at which the values of each tensor begin, by name.
    """

    files: tuple[TargetFile, ...]
    tensors: Mapping[str, StoredTensor]
    values: Mapping[str, tuple[Path, int]]


def lay_out(groups: Sequence[Sequence[TensorInfo]], max_shard_size: int) -> DcpLayout:
    """Lay tensors out in files of at most ``max_shard_size`` bytes of values.

    Args:
        groups: Every tensor, in order; those of a group go to the same file, even if it becomes larger.
        max_shard_size: Bytes of values per file.

    Raises:
        CheckpointError: A tensor occurs twice, or has a dtype that torch's storages lack.
    """
    files: list[TargetFile] = []
    tensors: dict[str, StoredTensor] = {}
    values: dict[str, tuple[Path, int]] = {}
    for number, shard in enumerate(_shards(groups, max_shard_size)):
        file, position = f"__0_{number}.distcp", 0
        archives: list[tuple[int, Callable[[], ArchiveLayout]]] = []
        storages = []
        for info in shard:
            if info.dtype not in STORAGES.values():
                raise CheckpointError(
                    f"tensor '{info.name}' has dtype {TORCH_NAMES[info.dtype]}, which cannot be written to a torch "
                    "distributed checkpoint; pass --dtype bf16, fp16 or fp32"
                )
            if info.name in tensors:
                raise CheckpointError(f"tensor '{info.name}' would be written twice")
            base, layout = position + -position % _ALIGNMENT, _archive(info.dtype, info.shape)
            offset, size = layout.storages["0"]
            archives.append((base, partial(_archive, info.dtype, info.shape)))
            storages.append((base + offset, size))
            values[info.name] = Path(file), base + offset
            chunk = Chunk(offsets=(0,) * len(info.shape), sizes=info.shape, file=file, offset=base, length=layout.size)
            tensors[info.name] = StoredTensor(info=info, chunks=(chunk,))
            position = base + layout.size
        files.append(TargetFile(name=file, size=position, archives=tuple(archives), storages=tuple(storages)))
    return DcpLayout(files=tuple(files), tensors=tensors, values=values)


def _shards(groups: Sequence[Sequence[TensorInfo]], max_shard_size: int) -> Iterator[list[TensorInfo]]:
    """Yield the tensors of each file."""
    shard: list[TensorInfo] = []
    filled = 0
    for group in groups:
        size = sum(info.nbytes for info in group)
        if shard and filled + size > max_shard_size:
            yield shard
            shard, filled = [], 0
        shard.extend(group)
        filled += size
    if shard:
        yield shard


_CHECKPOINT_VERSION = 3.0  # of older ones Megatron-LM reorders queries and keys


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


class DcpTarget(Dcp):
    """The layout of Megatron (``torch_dist``), written."""

    @staticmethod
    def plan_target(request: TargetRequest) -> PlannedTarget:
        """Lay a model out; one of no known family keeps its names. The parts of a tensor stay in one file.

        Raises:
            CheckpointError: A tensor has no name there, is missing, or has a dtype that torch's storages lack.
        """
        jobs, config = request.jobs(), request.config
        documents = request.documents(main_dtype(job.info for job in jobs))
        parts = _parts_of([job.info for job in jobs], config)
        pieces = [[of_part(job.info, part) for part in parts[job.info.name]] for job in jobs]
        layout = lay_out(pieces, request.write.max_shard_size)
        step = request.source.facts.info.get("step") or 0
        common = {"checkpoint_version": _CHECKPOINT_VERSION, "iteration": step}
        documents |= {
            COMMON_FILE: archive_bytes(Path(COMMON_FILE).stem, common),
            METADATA_NAME: metadata_bytes(layout.tensors),
            CONFIG_FILE: CHECKPOINT_CONFIG,
        }

        def places(job: TensorJob) -> list[Piece]:
            row = math.prod(job.info.shape[1:])
            return [Piece(*layout.values[p.name], p.start * row, p.stop * row) for p in parts[job.info.name]]

        plan = TargetPlan(
            kind="megatron",
            files=layout.files,
            jobs=jobs,
            places=places,
            documents=lambda _: documents,
            info={**request.info, "megatron_names": config is not None and has_megatron_names(config)},
        )
        return PlannedTarget(plan=plan, notes=megatron_notes(config))
