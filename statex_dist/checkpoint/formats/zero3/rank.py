"""One rank of a ZeRO-3 checkpoint: its two files, checked against rank 0's, and where its values lie in them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from statex_dist.checkpoint.dtypes import ITEM_BYTES
from statex_dist.checkpoint.formats.raw_io import read_bytes
from statex_dist.checkpoint.formats.tensor_io import Piece
from statex_dist.checkpoint.formats.torch_archive.pickle import Remembered, TensorRef
from statex_dist.checkpoint.formats.torch_archive.reader import place_of
from statex_dist.checkpoint.formats.torch_archive.zip import TorchArchive, open_archive
from statex_dist.checkpoint.formats.zero3.layout import RankFiles
from statex_dist.errors import CheckpointError

WEIGHTS = "fp32"
"""Name of the master weights beside the optimizer's states."""

_NAMED_RANK = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_(model|optim)_states$")


@dataclass(frozen=True, kw_only=True, slots=True)
class RankStates:
    """Places of one rank's values.

    Attributes:
        files: Its two files.
        archives: The same, opened, without their contents.
        flat: First piece (all elements) of each flat group, by state: the weights and the optimizer's states.
        frozen: This rank's fragment of each frozen parameter.
    """

    files: RankFiles
    archives: tuple[TorchArchive, TorchArchive]
    flat: Mapping[str, tuple[Piece, ...]]
    frozen: Mapping[str, Piece]


@dataclass(frozen=True, slots=True)
class Scalar:
    """A value that the optimizer keeps once per sub-group, such as ``step``: plain, or a tensor of one element."""

    value: Any
    dtype: str | None = None


def model_states(file: TorchArchive, first: TorchArchive, world_size: int) -> dict[str, Any]:
    """Return a rank's model states, after checking that they are of stage 3 and belong to rank 0's.

    Raises:
        CheckpointError: They are not, or the file is another rank's.
    """
    content = file.content
    if not isinstance(content, dict) or not isinstance(content.get("param_shapes"), list) or "module" not in content:
        raise CheckpointError(f"{file.path} is not a model states file of ZeRO stage 3 (no list 'param_shapes')")
    check_name(file)
    written = content.get("dp_world_size", world_size)
    if written != world_size:
        raise CheckpointError(f"{file.path} was written by {written} ranks; the directory holds files of {world_size}")
    if content.get("mp_world_size", 1) != 1:
        raise CheckpointError(f"{file.path}: checkpoints split by model parallelism are not supported")
    for key in ("global_steps", "param_shapes", "frozen_param_shapes", "buffer_names"):
        if content.get(key) != first.content.get(key):
            raise CheckpointError(f"{file.path}: '{key}' differs from {first.path.name}; the files are of two saves")
    return content


def check_name(file: TorchArchive) -> None:
    """Raise if a file was saved under another rank's name: torch writes the name into the archive."""
    inside, outside = _NAMED_RANK.search(file.root), _NAMED_RANK.search(file.path.stem)
    if inside and outside and inside.groups() != outside.groups():
        raise CheckpointError(
            f"{file.path} was saved as {file.root}.pt: a file of another rank was renamed or copied over this one"
        )


def optim_states(file: TorchArchive, world_size: int) -> dict[str, Any]:
    """Return a rank's optimizer states, after checking that they are of stage 3 and of ``world_size`` ranks.

    Raises:
        CheckpointError: They are not, or the file is another rank's, or holds no weights.
    """
    states = file.content.get("optimizer_state_dict") if isinstance(file.content, dict) else None
    if not isinstance(states, dict) or "zero_stage" not in states:
        raise CheckpointError(f"{file.path} is not an optimizer states file of DeepSpeed ZeRO")
    check_name(file)
    stage = states["zero_stage"]
    stage = stage.args[0] if isinstance(stage, Remembered) and len(stage.args) == 1 else stage
    if stage != 3:
        raise CheckpointError(f"{file.path} is of ZeRO stage {stage}; only stage 3 is supported")
    count = states.get("partition_count", world_size)
    count = max(count) if isinstance(count, list) else count
    if count != world_size:
        raise CheckpointError(f"{file.path} was written by {count} ranks; the directory holds files of {world_size}")
    if states.get("ds_zero_partition_groups"):
        raise CheckpointError(f"{file.path}: partition groups of expert parallelism (AutoEP) are not supported")
    groups = states.get("fp32_flat_groups")
    if not isinstance(groups, list) or not all(
        isinstance(g, TensorRef) and g.dtype == "F32" and g.is_contiguous for g in groups
    ):
        raise CheckpointError(
            f"{file.path} holds no fp32_flat_groups (offloaded to NVMe?): weights are not in this file"
        )
    return file.content


def base_states(optim: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the states of the optimizer that ZeRO is wrapped around, out of the contents of an optimizer file."""
    return optim["optimizer_state_dict"].get("optimizer_state_dict") or {}


def open_rank(files: RankFiles, first: tuple[TorchArchive, TorchArchive], world_size: int) -> RankStates:
    """Open and check one rank's files, and keep where its values lie.

    Args:
        files: The files.
        first: Rank 0's, opened.
        world_size: Number of ranks.

    Raises:
        CheckpointError: A file is damaged, or is not of the same save as rank 0's.
    """
    model = first[0] if files.model == first[0].path else open_archive(files.model)
    optim = first[1] if files.optim == first[1].path else open_archive(files.optim)
    content = model_states(model, first[0], world_size)
    states = optim_states(optim, world_size)["optimizer_state_dict"]
    flat = {WEIGHTS: tuple(place_of(optim, group) for group in states["fp32_flat_groups"])}
    inner, expected = base_states(optim.content), base_states(first[1].content)
    if inner.get("param_groups") != expected.get("param_groups"):
        raise CheckpointError(
            f"{optim.path}: 'param_groups' differs from {first[1].path.name}; the files are of two saves"
        )
    for state in state_names(inner, [p.numel for p in flat[WEIGHTS]], optim.path):
        flat[state] = tuple(place_of(optim, inner["state"][index][state]) for index in range(len(flat[WEIGHTS])))
    if scalar_values(inner, optim, flat) != scalar_values(expected, first[1], flat):
        raise CheckpointError(
            f"{optim.path}: the optimizer's step differs from {first[1].path.name}; the files are of two saves"
        )
    fragments = content.get("frozen_param_fragments") or {}
    return RankStates(
        files=files,
        archives=(_slim(model), _slim(optim)),
        flat=flat,
        frozen={name: place_of(model, fragment) for name, fragment in fragments.items()},
    )


def _slim(archive: TorchArchive) -> TorchArchive:
    """Return an archive without its contents and without storages that hold nothing."""
    entries = {name: entry for name, entry in archive.entries.items() if name.startswith("data/") and entry.size}
    return TorchArchive(path=archive.path, root=archive.root, entries=entries, state=archive.state, content=None)


def state_names(inner: Mapping[str, Any], sizes: list[int], path: Path) -> list[str]:
    """Return the optimizer's states that have a value per element.

    Raises:
        CheckpointError: Sub-groups have different states, or a state is of neither every element nor the sub-group.
    """
    states = inner.get("state") or {}
    if not states:
        return []
    if sorted(states) != list(range(len(sizes))):
        raise CheckpointError(
            f"{path}: the optimizer has states of sub-groups {sorted(states)}; there are {len(sizes)}"
        )
    names = sorted(states[0])
    found = []
    for index in range(len(sizes)):
        if sorted(states[index]) != names:
            raise CheckpointError(f"{path}: the optimizer's states of sub-group {index} are others than those of 0")
    for name in names:
        held = [states[index][name] for index in range(len(sizes))]
        if all(
            isinstance(v, TensorRef) and v.shape == (size,) and v.shape != ()
            for v, size in zip(held, sizes, strict=True)
        ):
            if not all(v.dtype == "F32" and v.is_contiguous for v in held):
                raise CheckpointError(f"{path}: the optimizer's state '{name}' is not fp32; only fp32 is supported")
            found.append(name)
        elif any(isinstance(v, TensorRef) and v.numel > 1 for v in held):
            raise CheckpointError(
                f"{path}: the optimizer's state '{name}' has neither one value per element nor one per sub-group; "
                "such an optimizer's states cannot be cut anew"
            )
    return found


def scalar_values(
    inner: Mapping[str, Any], archive: TorchArchive, per_element: Iterable[str]
) -> list[dict[str, Scalar]]:
    """Return the values that the optimizer keeps once per sub-group: those that are not ``per_element``."""
    result = []
    for _, values in sorted((inner.get("state") or {}).items()):
        scalars = {}
        for name, value in sorted(values.items()):
            if name in per_element:
                continue  # a sub-group of one element looks the same
            if isinstance(value, TensorRef) and value.shape in ((), (1,)) and value.numel == 1:
                place = place_of(archive, value)
                item = ITEM_BYTES[value.dtype]
                scalars[name] = Scalar((value.shape, read_bytes(place.path, place.offset, item)), value.dtype)
            elif not isinstance(value, TensorRef):
                scalars[name] = Scalar(value)
        result.append(scalars)
    return result
