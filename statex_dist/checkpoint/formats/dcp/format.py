"""The format of torch distributed checkpoints (DCP), which is also megatron-core's ``torch_dist``.

The format is a directory with ``.metadata`` and the files ``__0_0.distcp``, ... ``.metadata`` is a pickle that lists
the boxes ("chunks") of every tensor and their places. In the other files each chunk is a whole ``torch.save`` archive.
A reader accepts any number of chunks, because each rank of a job writes its own.
(Format: PyTorch, ``torch/distributed/checkpoint/{metadata,filesystem}.py``.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from statex_dist.checkpoint.dtypes import TORCH_NAMES
from statex_dist.checkpoint.formats.dcp.entries import ModelEntries, as_paths, model_entries
from statex_dist.checkpoint.formats.tensor_io import TensorInfo
from statex_dist.checkpoint.formats.torch_archive.pickle import (
    MAX_PICKLE_BYTES,
    Remembered,
    UnsafePickleError,
    loads,
)
from statex_dist.errors import CheckpointError, one_line, reason, shown

METADATA_NAME = ".metadata"
_MAX_AXES = 64

PACKAGE = "torch.distributed.checkpoint"
METADATA = f"{PACKAGE}.metadata.Metadata"
TENSOR = f"{PACKAGE}.metadata.TensorStorageMetadata"
_BYTES = f"{PACKAGE}.metadata.BytesStorageMetadata"
PROPERTIES = f"{PACKAGE}.metadata.TensorProperties"
CHUNK = f"{PACKAGE}.metadata.ChunkStorageMetadata"
INDEX = f"{PACKAGE}.metadata.MetadataIndex"
PLACE = f"{PACKAGE}.filesystem._StorageInfo"

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
    """Contents of a ``.metadata`` file.

    Attributes:
        tensors: Every tensor, by name.
        ignored: Names of entries that are not tensors but pickled objects (megatron's ``_extra_state``).
        paths: The keys that led to an entry in the dict that was saved, where the writer kept them.
    """

    tensors: Mapping[str, StoredTensor]
    ignored: tuple[str, ...] = ()
    paths: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def of_model(self, directory: Path) -> tuple[dict[str, StoredTensor], ModelEntries]:
        """Return the model's tensors by the model's names, and which entries they are.

        Args:
            directory: Of the checkpoint, for messages.

        Raises:
            CheckpointError: There are none, or two of one name.
        """
        try:
            chosen = model_entries(self.tensors, self.ignored, self.paths)
        except ValueError as error:
            raise CheckpointError(f"{directory}: {one_line(error)}") from None
        if self.tensors and not chosen.names:
            raise CheckpointError(f"{directory} holds no tensor of a model: {chosen.note()}")
        held = {
            name: replace(self.tensors[old], info=replace(self.tensors[old].info, name=name))
            for old, name in chosen.names.items()
        }
        return held, chosen


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
        fields = _fields(content, METADATA)
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
    return DcpContents(tensors=tensors, ignored=tuple(ignored), paths=as_paths(fields.get("planner_data")))


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
        key, fields = _fields(index, INDEX), _fields(place, PLACE)
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
    fields = _fields(entry, TENSOR)
    properties = fields["properties"]
    if not isinstance(properties, Remembered) or properties.NAME != PROPERTIES:
        raise ValueError(f"no properties of tensor '{name}'")
    dtype = getattr(properties.state[0], "NAME", "of no name")
    if dtype not in _DTYPES:
        raise ValueError(f"tensor '{name}' has dtype {dtype}; supported: {', '.join(_DTYPES)}")
    shape, chunks = _numbers(fields["size"]), []
    for chunk in fields["chunks"]:
        box = _fields(chunk, CHUNK)
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
