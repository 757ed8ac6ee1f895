"""Reading and writing Hugging Face safetensors directories, one tensor at a time.

Format: an 8-byte little-endian header length, a JSON header with ``dtype``, ``shape`` and ``data_offsets`` of every
tensor, and the values (https://github.com/huggingface/safetensors). Everything in a header is checked before it is
used: a checkpoint is often somebody else's file. The writer knows all tensors beforehand, so headers and shards are
laid out first, the files preallocated (a full disk fails at once) and the tensors put in their places in any order.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from checkpoints_tools.raw_io import read_into, write_from
from checkpoints_tools.tensor_io import SourceFacts, TensorInfo, total_bytes
from statex_dist.checkpoint.manifest import sync, write_durably
from statex_dist.errors import CheckpointError

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
_INDEX_MAX_BYTES = 100_000_000

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """Where a tensor's bytes are: file and absolute offset."""

    info: TensorInfo
    path: Path
    offset: int


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _entry(path: Path, name: str, value: Any) -> tuple[TensorInfo, int, int]:
    """Return info, begin and end of one header entry."""
    try:
        dtype, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise CheckpointError(f"{path}: header entry of '{name}' lacks dtype, shape or data_offsets") from None
    if dtype not in _DTYPES:
        raise CheckpointError(f"{path}: tensor '{name}' has dtype {dtype!r}; supported: {', '.join(_DTYPES)}")
    if not isinstance(shape, list) or not all(map(_is_size, shape)) or not _is_size(begin) or not _is_size(end):
        raise CheckpointError(f"{path}: tensor '{name}' has a bad shape {shape!r} or bad offsets [{begin!r}, {end!r}]")
    info = TensorInfo(name=name, shape=tuple(shape), dtype=_DTYPES[dtype])
    if end - begin != info.nbytes:
        raise CheckpointError(
            f"{path}: tensor '{name}' of shape {shape} and dtype {dtype} needs {info.nbytes} bytes; "
            f"its offsets [{begin}, {end}] hold {end - begin}"
        )
    return info, begin, end


def read_header(path: Path) -> dict[str, tuple[TensorInfo, int]]:
    """Return info and absolute byte offset of every tensor of a safetensors file.

    Raises:
        CheckpointError: The file is missing, truncated, or its header is not consistent (sizes, overlaps, holes).
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or (8 + length > size and length <= MAX_HEADER_BYTES):
                raise CheckpointError(f"{path} is truncated: {size} bytes cannot hold its safetensors header")
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{path} is not a safetensors file: header of {length} bytes (at most {MAX_HEADER_BYTES})"
                )
            header = json.loads(file.read(length), object_pairs_hook=_no_duplicates)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the safetensors header is not valid JSON: {error}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the safetensors header is not a JSON object")
    header.pop("__metadata__", None)
    start, data_bytes = 8 + length, size - 8 - length
    entries = sorted((_entry(path, name, value) for name, value in header.items()), key=lambda entry: entry[1:])
    position, previous = 0, ""
    for info, begin, end in entries:
        if end > data_bytes:
            raise CheckpointError(
                f"{path} is truncated: tensor '{info.name}' ends at byte {start + end}, the file at byte {size}"
            )
        if begin < position:
            raise CheckpointError(f"{path}: tensors '{previous}' and '{info.name}' overlap")
        if begin > position:
            raise CheckpointError(f"{path}: {begin - position} bytes before tensor '{info.name}' belong to no tensor")
        position, previous = end, info.name
    if position != data_bytes:
        raise CheckpointError(f"{path}: {data_bytes - position} bytes at the end belong to no tensor")
    return {info.name: (info, start + begin) for info, begin, _ in entries}


def _read_index(path: Path) -> dict[str, str]:
    """Return the checked ``weight_map`` of an index file."""
    try:
        if path.stat().st_size > _INDEX_MAX_BYTES:
            raise CheckpointError(f"{path} is larger than {_INDEX_MAX_BYTES} bytes: not an index")
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as an index with a weight_map: {error!r}") from None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map is empty or not a mapping of tensor names to files")
    for name, file in weight_map.items():
        if not isinstance(file, str) or "\\" in file or PurePosixPath(file).name != file or file in ("", ".", ".."):
            raise CheckpointError(
                f"{path}: tensor '{name}' is in {file!r}; only files of the same directory are allowed"
            )
    return weight_map


class SafetensorsSource:
    """A Hugging Face directory: ``model.safetensors``, or shards and their index.

    Args:
        directory: The directory.
        verified: Whether the caller has verified the weight files against a manifest.
        info: Facts of the writer, if known.

    Raises:
        CheckpointError: A file is missing, damaged or not listed in the index.
    """

    def __init__(self, directory: Path, *, verified: bool = False, info: dict[str, Any] | None = None):
        self.files: list[Path] = []
        self._places: dict[str, _Place] = {}
        if (directory / SINGLE_NAME).exists():
            weight_map: dict[str, str] | None = None
            self.files = [directory / SINGLE_NAME]
        else:
            weight_map = _read_index(directory / INDEX_NAME)
            self.files = [directory / name for name in dict.fromkeys(weight_map.values())]
        for path in self.files:
            if not path.is_file():
                raise CheckpointError(f"{path} is missing; {INDEX_NAME} lists it")
            for name, (tensor, offset) in read_header(path).items():
                if weight_map is not None and weight_map.get(name) != path.name:
                    raise CheckpointError(f"{path} holds tensor '{name}', which {INDEX_NAME} does not place there")
                self._places[name] = _Place(info=tensor, path=path, offset=offset)
        if weight_map is not None:
            if missing := [name for name in weight_map if name not in self._places]:
                raise CheckpointError(
                    f"{directory / weight_map[missing[0]]} lacks tensor '{missing[0]}' of {INDEX_NAME}"
                )
            self._places = {name: self._places[name] for name in weight_map}
        self._facts = SourceFacts(
            kind="hf",
            path=directory,
            model_dir=directory if (directory / "config.json").is_file() else None,
            verified=verified,
            info=info or {},
        )

    @property
    def facts(self) -> SourceFacts:
        """What is known about the checkpoint."""
        return self._facts

    @property
    def aliases(self) -> Mapping[str, str]:
        """Nothing: a safetensors file cannot say that two tensors are one."""
        return {}

    def keys(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._places)

    def info(self, name: str) -> TensorInfo:
        """Return shape and dtype of a tensor."""
        return self._places[name].info

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor.

        Raises:
            CheckpointError: The file ends early or cannot be read.
        """
        place = self._places[name]
        tensor = torch.empty(place.info.shape, dtype=place.info.dtype)
        read_into(tensor, place.path, place.offset)
        return tensor


def assign_shards(infos: Sequence[TensorInfo], max_shard_size: int) -> list[list[TensorInfo]]:
    """Fill shards in order up to ``max_shard_size`` bytes; a larger tensor gets a shard of its own."""
    shards: list[list[TensorInfo]] = [[]]
    filled = 0
    for info in infos:
        if shards[-1] and filled + info.nbytes > max_shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(info)
        filled += info.nbytes
    return shards


class SafetensorsSink:
    """Writes a directory of safetensors files under Hugging Face's names.

    Args:
        directory: Existing directory to write into.
        infos: Every tensor that will be written.
        max_shard_size: Bytes of values per file, at most (but for a larger tensor).

    Raises:
        CheckpointError: The disk is full, or a dtype has no name in the format.
    """

    def __init__(self, directory: Path, infos: Sequence[TensorInfo], *, max_shard_size: int):
        self._places: dict[str, _Place] = {}
        self._pending = {info.name for info in infos}
        self._descriptors: dict[Path, int] = {}
        self._directory, self._total = directory, total_bytes(infos)
        assert len(self._pending) == len(infos), "a tensor is declared twice"
        shards = assign_shards(infos, max_shard_size)
        try:
            for number, shard in enumerate(shards, start=1):
                name = SINGLE_NAME if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
                self._create(directory / name, shard)
        except BaseException:
            self.close()
            raise

    def _create(self, path: Path, shard: Sequence[TensorInfo]) -> None:
        """Write a shard's header and reserve the space of its values."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position, begins = 0, {}
        # Wide elements first, as the safetensors library does: then every tensor is aligned to its element size.
        for info in sorted(shard, key=lambda info: -info.dtype.itemsize):
            if info.dtype not in _DTYPE_NAMES:
                raise CheckpointError(f"tensor '{info.name}' has dtype {info.dtype}, which safetensors cannot store")
            begins[info.name] = position
            header[info.name] = {
                "dtype": _DTYPE_NAMES[info.dtype],
                "shape": list(info.shape),
                "data_offsets": [position, position + info.nbytes],
            }
            position += info.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
            self._descriptors[path] = descriptor
            os.posix_fallocate(descriptor, 0, start + position)
            os.pwrite(descriptor, len(text).to_bytes(8, "little") + text, 0)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be written ({start + position} bytes): {error.strerror}") from None
        for info in shard:
            self._places[info.name] = _Place(info=info, path=path, offset=start + begins[info.name])

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor to its place.

        Raises:
            CheckpointError: The disk refuses, or the tensor is not as it was declared.
        """
        place = self._places[name]
        if tuple(tensor.shape) != place.info.shape or tensor.dtype != place.info.dtype:
            raise CheckpointError(
                f"tensor '{name}' came as {tuple(tensor.shape)} {tensor.dtype}; "
                f"declared {place.info.shape} {place.info.dtype}"
            )
        try:
            write_from(tensor.contiguous(), self._descriptors[place.path], place.offset)
        except OSError as error:
            raise CheckpointError(f"{place.path} cannot be written: {error.strerror}") from None
        self._pending.discard(name)

    def finish(self) -> list[Path]:
        """Flush all files to disk, write the index of several shards and return every file written."""
        assert not self._pending, f"not written: {sorted(self._pending)[:3]}"
        files = list(self._descriptors)
        for descriptor in self._descriptors.values():
            os.fsync(descriptor)
        self.close()
        if len(files) > 1:
            weight_map = {name: place.path.name for name, place in self._places.items()}
            index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
            write_durably(self._directory / INDEX_NAME, json.dumps(index, indent=2) + "\n")
            files.append(self._directory / INDEX_NAME)
        sync(self._directory)
        return files

    def close(self) -> None:
        """Close the files, finished or not."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors = {}
