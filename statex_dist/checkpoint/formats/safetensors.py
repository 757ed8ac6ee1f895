"""Reading Hugging Face safetensors directories.

Format: an 8-byte little-endian header length, a JSON header with ``dtype``, ``shape`` and ``data_offsets`` of every
tensor, and the values (https://github.com/huggingface/safetensors). Everything in a header is checked before it is
used, because a checkpoint often comes from another user.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from statex_dist.checkpoint.dtypes import ITEM_BYTES
from statex_dist.checkpoint.formats.places import missing_text, pointer_text
from statex_dist.checkpoint.formats.registry import Layout, Open
from statex_dist.checkpoint.formats.tensor_io import Piece, Pieces, SourceFacts, TensorInfo, TensorSource
from statex_dist.checkpoint.json_file import parse_json, read_json
from statex_dist.errors import CheckpointError, reason, shown

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
_MAX_AXES = 64


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _entry(path: Path, name: str, value: Any) -> tuple[TensorInfo, int, int]:
    """Return info, begin and end of one header entry."""
    try:
        dtype, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise CheckpointError(f"{path}: header entry of '{name}' lacks dtype, shape or data_offsets") from None
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise CheckpointError(f"{path}: tensor '{name}' has dtype {shown(dtype)}; supported: {', '.join(ITEM_BYTES)}")
    is_shape = isinstance(shape, list) and len(shape) <= _MAX_AXES and all(map(_is_size, shape))
    if not is_shape or not _is_size(begin) or not _is_size(end):
        raise CheckpointError(
            f"{path}: tensor '{name}' has a bad shape {shown(shape)} or bad offsets [{shown(begin)}, {shown(end)}]"
        )
    info = TensorInfo(name=name, shape=tuple(shape), dtype=dtype)
    if end - begin != info.nbytes:
        raise CheckpointError(
            f"{path}: tensor '{name}' of shape {shown(shape)} and dtype {dtype} needs {info.nbytes} bytes; "
            f"its offsets [{begin}, {end}] hold {end - begin}"
        )
    return info, begin, end


def read_header(path: Path) -> tuple[dict[str, tuple[TensorInfo, int]], dict[str, str]]:
    """Return info and absolute byte offset of every tensor of a safetensors file, and its metadata.

    Raises:
        CheckpointError: The file is missing, truncated, or its header is not consistent (sizes, overlaps, holes).
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if (size < 8 or 8 + length > size) and (pointer := pointer_text(path)):
                raise CheckpointError(pointer)
            if size < 8 or (8 + length > size and length <= MAX_HEADER_BYTES):
                raise CheckpointError(f"{path} is truncated: {size} bytes cannot hold its safetensors header")
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{path} is not a safetensors file: header of {length} bytes (at most {MAX_HEADER_BYTES})"
                )
            header = parse_json(file.read(length), parse=partial(json.loads, object_pairs_hook=_no_duplicates))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the safetensors header is not valid JSON: {reason(error)}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the safetensors header is not a JSON object")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ is not a mapping of names to texts")
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
    return {info.name: (info, start + begin) for info, begin, _ in entries}, metadata


def read_index(path: Path) -> dict[str, str]:
    """Return the checked ``weight_map`` of an index file."""
    try:
        weight_map = read_json(path)["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as an index with a weight_map: {reason(error)}") from None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map is empty or not a mapping of tensor names to files")
    for name, file in weight_map.items():
        if not isinstance(file, str) or "\\" in file or PurePosixPath(file).name != file or file in ("", ".", ".."):
            raise CheckpointError(
                f"{path}: tensor '{name}' is in {shown(file)}; only files of the same directory are allowed"
            )
    return weight_map


def check_map(weight_map: Mapping[str, str], found: Container[str], index: Path) -> None:
    """Raise if a tensor that an index lists is in none of its files.

    Raises:
        CheckpointError: It is not.
    """
    if missing := [name for name in weight_map if name not in found]:
        raise CheckpointError(f"{index.parent / weight_map[missing[0]]} lacks tensor '{missing[0]}' of {index.name}")


def ways_of(directory: Path, index: str, single: str, opener: Callable[..., TensorSource]) -> dict[str, Open]:
    """Return the files by which a directory can be read: its index, and a single file that the index does not list.

    Args:
        directory: The directory.
        index: Name of the index.
        single: Name of the one file of a model without an index.
        opener: Opens the directory; called with ``single``, which says by which of the two.
    """
    found: dict[str, Open] = {}
    has_index = (directory / index).exists()
    if has_index:
        found[index] = partial(opener, directory, single=False)
    if (directory / single).exists() and not (has_index and single in read_index(directory / index).values()):
        found[single] = partial(opener, directory, single=True)
    return found


class SafetensorsSource(TensorSource):
    """A Hugging Face directory: shards and their index, or ``model.safetensors``.

    Attributes:
        metadata: The entries of the files' ``__metadata__``, but for those on which files differ.
        contradictory: The names of the latter.

    Args:
        directory: The directory.
        facts: Facts about the checkpoint; None takes them from the directory itself.
        single: Whether to read ``model.safetensors`` even if there is an index; None where there is none.

    Raises:
        CheckpointError: A file is missing, damaged or not listed in the index.
    """

    def __init__(self, directory: Path, facts: SourceFacts | None = None, *, single: bool | None = None):
        self._places: dict[str, tuple[TensorInfo, Piece]] = {}
        self.metadata: dict[str, str] = {}
        self.contradictory: set[str] = set()
        if single or (single is None and not (directory / INDEX_NAME).exists()):
            weight_map: dict[str, str] | None = None
            files = [directory / SINGLE_NAME]
        else:
            weight_map = read_index(directory / INDEX_NAME)
            files = [directory / name for name in dict.fromkeys(weight_map.values())]
        for path in files:
            if weight_map is not None and not path.is_file():
                raise CheckpointError(missing_text(path, INDEX_NAME))
            tensors, metadata = read_header(path)
            self.contradictory |= {k for k, value in metadata.items() if self.metadata.setdefault(k, value) != value}
            for name, (tensor, offset) in tensors.items():
                if weight_map is not None and weight_map.get(name) != path.name:
                    raise CheckpointError(f"{path} holds tensor '{name}', which {INDEX_NAME} does not place there")
                self._places[name] = tensor, Piece(path, offset, 0, tensor.numel)
        if weight_map is not None:
            check_map(weight_map, self._places, directory / INDEX_NAME)
            self._places = {name: self._places[name] for name in weight_map}
        self.metadata = {k: value for k, value in self.metadata.items() if k not in self.contradictory}
        facts = facts or SourceFacts.of_directory("hf", directory)
        super().__init__(facts, {name: tensor for name, (tensor, _) in self._places.items()}, files)

    def stored_pieces(self, name: str) -> Pieces:
        """Return where a tensor lies: one run of one file."""
        return (self._places[name][1],)


class Safetensors(Layout):
    """The layout of Hugging Face directories with safetensors."""

    @staticmethod
    def ways(directory: Path) -> dict[str, Open]:
        """Return the files by which a directory can be read, the one that is taken first."""
        return ways_of(directory, INDEX_NAME, SINGLE_NAME, SafetensorsSource)
