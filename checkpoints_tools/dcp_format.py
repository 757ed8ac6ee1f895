"""The format of torch distributed checkpoints (DCP), which is also megatron-core's ``torch_dist``.

A directory with ``.metadata``, a pickle that says of every tensor of which boxes ("chunks") it consists and where they
lie, and ``__0_0.distcp``, ...: files in which each chunk is a whole ``torch.save`` archive. Reading takes any number of
chunks, as many ranks write them; we write every tensor as one chunk, which a reader may cut for any number of ranks.
(Format: PyTorch, ``torch/distributed/checkpoint/{metadata,filesystem}.py``.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import Any

from checkpoints_tools.target_writer import TargetFile
from checkpoints_tools.tensor_io import TensorInfo
from checkpoints_tools.torch_pickle_writer import dumps
from checkpoints_tools.torch_zip import ArchiveLayout
from statex_dist.checkpoint.dtypes import TORCH_NAMES
from statex_dist.checkpoint.torch_pickle import (
    MAX_PICKLE_BYTES,
    STORAGES,
    Remembered,
    Size,
    UnsafePickleError,
    loads,
    named,
    new_tensor,
)
from statex_dist.errors import CheckpointError, one_line, reason, shown

METADATA_NAME = ".metadata"
_VERSION = "1.0.0"
_ALIGNMENT = 64
_MAX_AXES = 64

_PACKAGE = "torch.distributed.checkpoint"
_METADATA = f"{_PACKAGE}.metadata.Metadata"
_TENSOR = f"{_PACKAGE}.metadata.TensorStorageMetadata"
_BYTES = f"{_PACKAGE}.metadata.BytesStorageMetadata"
_PROPERTIES = f"{_PACKAGE}.metadata.TensorProperties"
_CHUNK = f"{_PACKAGE}.metadata.ChunkStorageMetadata"
_INDEX = f"{_PACKAGE}.metadata.MetadataIndex"
_PLACE = f"{_PACKAGE}.filesystem._StorageInfo"

_DTYPES = {f"torch.{theirs}": ours for ours, theirs in TORCH_NAMES.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """A box of a tensor, and the archive that holds it.

    Attributes:
        offsets: First index along each axis.
        sizes: Extent along each axis.
        file: Name of the file, in the checkpoint's directory.
        offset: Byte of the file at which the archive begins.
        length: Bytes of the archive.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    offset: int
    length: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.sizes)


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """A tensor of a checkpoint and the chunks that it consists of."""

    info: TensorInfo
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class DcpContents:
    """What a ``.metadata`` lists.

    Attributes:
        tensors: Every tensor, by name.
        ignored: Names of entries that are not tensors but pickled objects (megatron's ``_extra_state``).
    """

    tensors: Mapping[str, StoredTensor]
    ignored: tuple[str, ...] = ()


def read_metadata(path: Path) -> DcpContents:
    """Read a ``.metadata`` that torch or megatron-core wrote; nothing in it is run.

    Raises:
        CheckpointError: The file is missing, damaged, refused, or says what cannot be.
    """
    try:
        size = path.stat().st_size
        if size > MAX_PICKLE_BYTES:
            raise CheckpointError(f"{path} has {size} bytes; at most {MAX_PICKLE_BYTES} are read")
        content, _ = loads(path.read_bytes())
    except UnsafePickleError as error:
        raise CheckpointError(f"{path} is refused: its pickle needs more than tensors: {one_line(error)}") from None
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    try:
        fields = _fields(content, _METADATA)
        entries, places = _dict(fields["state_dict_metadata"]), _places(fields["storage_data"])
        tensors, ignored = {}, []
        for name, entry in entries.items():
            if not isinstance(name, str) or not isinstance(entry, Remembered):
                raise ValueError(f"an entry {shown(name)} that is no tensor")
            if entry.NAME == _BYTES:
                ignored.append(name)
            else:
                tensors[name] = _tensor(name, entry, places)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        text = f"it lacks {reason(error)}" if isinstance(error, KeyError) else one_line(error)
        raise CheckpointError(f"{path} is not what torch writes: {text}") from None
    return DcpContents(tensors=tensors, ignored=tuple(ignored))


def _fields(value: Any, name: str) -> dict[str, Any]:
    """Return the fields of an object of torch's."""
    if not isinstance(value, Remembered) or name != value.NAME or not isinstance(value.state, dict):
        raise ValueError(f"{getattr(value, 'NAME', type(value).__name__)} where {name} should stand")
    return value.state


def _dict(value: Any) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{type(value).__name__} where a dict should stand")
    return value


def _numbers(value: Any) -> tuple[int, ...]:
    """Return sizes or offsets."""
    if (
        not isinstance(value, tuple | list)
        or len(value) > _MAX_AXES
        or not all(type(n) is int and 0 <= n < 2**63 for n in value)
    ):
        raise ValueError(f"sizes or offsets {shown(value)}")
    return tuple(value)


def _places(value: Any) -> dict[tuple[str, tuple[int, ...]], tuple[str, int, int]]:
    """Return file, offset and length by name and first indices; pickled objects have no place among them."""
    found: dict[tuple[str, tuple[int, ...]], tuple[str, int, int]] = {}
    for index, place in _dict(value).items():
        key, fields = _fields(index, _INDEX), _fields(place, _PLACE)
        file, offset, length = fields["relative_path"], *_numbers([fields["offset"], fields["length"]])
        if not isinstance(file, str) or "\\" in file or PurePosixPath(file).name != file or file in ("", ".", ".."):
            raise ValueError(f"{shown(key['fqn'])} is in {shown(file)}; only files of the same directory are allowed")
        if fields.get("transform_descriptors"):
            raise ValueError(
                f"{shown(key['fqn'])} is stored with {shown(fields['transform_descriptors'])}, which we cannot undo"
            )
        if key.get("offset") is None:
            continue
        begin = (key["fqn"], _numbers(key["offset"]))
        if found.setdefault(begin, (file, offset, length)) != (file, offset, length):
            raise ValueError(f"two places for the chunk of '{begin[0]}' at {list(begin[1])}")
    return found


def _tensor(name: str, entry: Remembered, places: Mapping[Any, tuple[str, int, int]]) -> StoredTensor:
    fields = _fields(entry, _TENSOR)
    properties = fields["properties"]
    if not isinstance(properties, Remembered) or properties.NAME != _PROPERTIES:
        raise ValueError(f"no properties of tensor '{name}'")
    dtype = getattr(properties.state[0], "NAME", "of no name")
    if dtype not in _DTYPES:
        raise ValueError(f"tensor '{name}' has dtype {dtype}; supported: {', '.join(_DTYPES)}")
    shape, chunks = _numbers(fields["size"]), []
    for chunk in fields["chunks"]:
        box = _fields(chunk, _CHUNK)
        offsets, sizes = _numbers(box["offsets"]), _numbers(box["sizes"])
        if len(offsets) != len(shape) or len(sizes) != len(shape):
            raise ValueError(f"a chunk of tensor '{name}' that has not as many axes as the tensor")
        if any(begin + size > whole for begin, size, whole in zip(offsets, sizes, shape, strict=True)):
            raise ValueError(
                f"a chunk of tensor '{name}', {list(sizes)} at {list(offsets)}, that is not inside {list(shape)}"
            )
        if (name, offsets) not in places:
            raise ValueError(f"no place for the chunk of tensor '{name}' at {list(offsets)}")
        file, offset, length = places[name, offsets]
        chunks.append(Chunk(offsets=offsets, sizes=sizes, file=file, offset=offset, length=length))
    return StoredTensor(info=TensorInfo(name=name, shape=shape, dtype=_DTYPES[dtype]), chunks=tuple(chunks))


def metadata_bytes(tensors: Mapping[str, StoredTensor]) -> bytes:
    """Return the ``.metadata`` that lists tensors; it names no path of this machine, as torch's own would."""
    memory_format = named(f"{_PACKAGE}.metadata._MEM_FORMAT_ENCODING")(0)
    strided = named("torch.serialization._get_layout")("torch.strided")
    entries: dict[str, Any] = {}
    places: dict[Any, Any] = {}
    for name, tensor in tensors.items():
        dtype = named(f"torch.{TORCH_NAMES[tensor.info.dtype]}")
        chunks = [_made(_CHUNK, {"offsets": Size(c.offsets), "sizes": Size(c.sizes)}) for c in tensor.chunks]
        properties = _made(_PROPERTIES, (dtype, strided, False, memory_format, False))
        entries[name] = _made(_TENSOR, {"properties": properties, "size": Size(tensor.info.shape), "chunks": chunks})
        for number, chunk in enumerate(tensor.chunks):
            index = _made(_INDEX, {"fqn": name, "index": number, "offset": Size(chunk.offsets)})
            place = {"relative_path": chunk.file, "offset": chunk.offset, "length": chunk.length}
            places[index] = _made(_PLACE, place)
    fields = {
        "state_dict_metadata": entries,
        "planner_data": {name: (name,) for name in tensors},
        "storage_data": places,
        "storage_meta": None,
        "version": _VERSION,
    }
    return dumps(_made(_METADATA, fields))


def _made(name: str, state: Any) -> Remembered:
    """Return an object that the reader makes without calling its class, and then gives its state."""
    made = named(name)()
    made.by_call, made.state = False, state
    return made


@lru_cache(maxsize=4096)
def _archive(dtype: str, shape: tuple[int, ...]) -> ArchiveLayout:
    """Return the archive of one tensor."""
    info = TensorInfo(name="", shape=shape, dtype=dtype)
    return ArchiveLayout.build("archive", new_tensor("0", dtype, shape), {"0": info.nbytes})


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
