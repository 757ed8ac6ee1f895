"""Logical tensors out of a native DeepSpeed ZeRO stage 3 checkpoint, without importing deepspeed or torch.

What DeepSpeed's own ``zero_to_fp32`` gives: fp32 master weights of the trained parameters, frozen parameters in the
dtype that they have, buffers and tied names. And what it does not: the optimizer's states, and every check that tells
whether the files belong together. Of each rank only the places of its storages are kept, so that a thousand ranks fit
in memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints_tools.raw_io import read_bytes
from checkpoints_tools.tensor_io import Piece, Pieces, SourceFacts, TensorInfo, TensorSource
from checkpoints_tools.torch_pickle import Remembered, TensorRef
from checkpoints_tools.torch_reader import place_of, whole_pieces
from checkpoints_tools.torch_zip import TorchArchive, open_archive
from checkpoints_tools.zero3_layout import FlatLayout, RankFiles, find_rank_files, partition_size
from statex_dist.errors import CheckpointError

WEIGHTS = "fp32"
"""Name of the master weights beside the optimizer's states."""

_NAMED_RANK = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_(model|optim)_states$")


@dataclass(frozen=True, kw_only=True, slots=True)
class RankStates:
    """Where one rank's values lie.

    Attributes:
        files: Its two files.
        archives: The same, opened, without their contents.
        flat: First piece (all elements) of each flat group, by state: the weights and what the optimizer remembers.
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


class Zero3Source(TensorSource):
    """One tag of a ZeRO-3 checkpoint.

    Attributes:
        world_size: Number of ranks.
        ranks: Where each rank's values lie.
        layout: How the trained parameters are cut.
        frozen_dtypes: Dtype of each frozen parameter.
        groups: Names of the parameters of each optimizer group, in flat order.
        scalars: What the optimizer keeps once per parameter group, by its names.
        model: Contents of rank 0's model states.
        optim: Contents of rank 0's optimizer states.

    Args:
        directory: The tag's directory, with two files a rank.
        model_dir: Directory with ``config.json``, if the checkpoint has one.
        verified: Whether there is a manifest to which every byte that is read is held.
        info: Further facts of the writer.
        digests: Digests of the tensors, if known.
        state_digests: Those of the optimizer's states, by their names.
        only_first: Whether to open rank 0's files alone: enough to say what the checkpoint is, not to read it.

    Raises:
        CheckpointError: A file is missing, damaged, refused, or the files do not belong together.
    """

    def __init__(
        self,
        directory: Path,
        *,
        model_dir: Path | None,
        verified: bool = False,
        info: dict[str, Any] | None = None,
        digests: Mapping[str, str] | None = None,
        state_digests: Mapping[str, Mapping[str, str]] | None = None,
        only_first: bool = False,
    ):
        files = find_rank_files(directory)
        world_size = self.world_size = len(files)
        first = open_archive(files[0].model), open_archive(files[0].optim)
        self.model: dict[str, Any] = _model_states(first[0], first[0], world_size)
        self.optim: dict[str, Any] = _optim_states(first[1], world_size)
        self.ranks = [_open_rank(rank, first, world_size) for rank in (files[:1] if only_first else files)]
        shapes = {name: tuple(shape) for group in self.model["param_shapes"] for name, shape in group.items()}
        sizes = [piece.numel for piece in self.ranks[0].flat[WEIGHTS]]
        for rank in self.ranks:
            for state, pieces in rank.flat.items():
                if [piece.numel for piece in pieces] != sizes:
                    raise CheckpointError(
                        f"{rank.files.optim}: the flat groups of its {state} differ in size from those of rank 0"
                    )
        self.layout = FlatLayout.build(shapes, sizes, world_size, where=directory)
        self.groups = _parameter_groups(self.model, self.optim, first[1].path)
        self.scalars = _scalars(self.groups, self.optim, self.model, first[1], self.ranks[0].flat)
        frozen = {name: tuple(shape) for name, shape in (self.model.get("frozen_param_shapes") or {}).items()}
        self._check_frozen(frozen)
        fragments = self.model.get("frozen_param_fragments") or {}
        module = self.model["module"]
        self._first = first[0]
        self._buffers: dict[str, TensorRef] = {
            name: module[name] for name in self.model["buffer_names"] if isinstance(module.get(name), TensorRef)
        }
        infos = {
            **{n: TensorInfo(name=n, shape=module[n].shape, dtype=module[n].dtype) for n in self._buffers},
            **{n: TensorInfo(name=n, shape=shape, dtype=fragments[n].dtype) for n, shape in frozen.items()},
            **{n: TensorInfo(name=n, shape=shape, dtype="F32") for n, shape in shapes.items()},
        }
        shared = dict(self.model.get("shared_params") or {})
        aliases = {a: owner for a, owner in shared.items() if owner in infos and a not in infos}
        for alias, owner in aliases.items():
            infos[alias] = TensorInfo(name=alias, shape=infos[owner].shape, dtype=infos[owner].dtype)
        told = {
            "step": self.model.get("global_steps"),
            "world_size": world_size,
            "ds_version": self.model.get("ds_version"),
        }
        facts = SourceFacts(
            kind="zero3",
            path=directory,
            model_dir=model_dir,
            verified=verified,
            info={**(info or {}), **told},
            digests=digests or {},
        )
        paths = [path for rank in files for path in (rank.model, rank.optim)]
        super().__init__(facts, infos, paths, aliases=aliases, buffers=self._buffers)
        self.frozen = frozen
        known = state_digests or {}
        self._states = {
            state: Zero3StateSource(self, state, known.get(state, {}))
            for state in self.ranks[0].flat
            if state != WEIGHTS
        }

    def _check_frozen(self, frozen: Mapping[str, tuple[int, ...]]) -> None:
        """Raise unless every rank holds its fragment of every frozen parameter."""
        for name, shape in frozen.items():
            part = partition_size(TensorInfo(name=name, shape=shape, dtype="F32").numel, self.world_size)
            for rank in self.ranks:
                held = rank.frozen[name].numel if name in rank.frozen else 0
                if held != part:
                    found = f"{held} elements" if held else "nothing"
                    raise CheckpointError(
                        f"{rank.files.model}: frozen parameter '{name}' needs {part} elements here; found {found}"
                    )

    def pieces(self, name: str) -> Pieces:
        """Return where a tensor lies, in the files of all ranks."""
        name = self.aliases.get(name, name)
        if name in self._buffers:
            return whole_pieces(self._first, self._buffers[name])
        if name in self.frozen:
            return self._frozen_pieces(name)
        return self.flat_pieces(name, WEIGHTS)

    def flat_pieces(self, name: str, state: str) -> Pieces:
        """Return where a trained parameter, or what the optimizer remembers of it, lies."""
        pieces = []
        for run in self.layout.runs(name):
            group = self.ranks[run.rank].flat[state][run.group]
            pieces.append(Piece(group.path, group.offset + 4 * run.start, run.target, run.target + run.numel))
        return pieces

    def _frozen_pieces(self, name: str) -> Pieces:
        info = self._infos[name]
        part = partition_size(info.numel, self.world_size)
        pieces = []
        for index, rank in enumerate(self.ranks):
            fragment, stop = rank.frozen[name], min((index + 1) * part, info.numel)
            if index * part < stop:
                pieces.append(Piece(fragment.path, fragment.offset, index * part, stop))
        return pieces

    def archives(self) -> Iterable[TorchArchive]:
        """Return both files of every rank."""
        return [archive for rank in self.ranks for archive in rank.archives]

    def states(self) -> Mapping[str, TensorSource]:
        """Return the optimizer's states that have a value per element, such as ``exp_avg``."""
        return self._states

    def model_states(self, rank: int) -> TorchArchive:
        """Open a rank's model states again, contents and all."""
        return open_archive(self.ranks[rank].files.model)


class Zero3StateSource(TensorSource):
    """What the optimizer of a ZeRO-3 checkpoint remembers of every trained parameter.

    Args:
        whole: The checkpoint.
        state: Name of the state.
        digests: Digests of the values, if known.
    """

    def __init__(self, whole: Zero3Source, state: str, digests: Mapping[str, str]):
        self._whole, self._state = whole, state
        facts = SourceFacts(
            kind="zero3", path=whole.facts.path, model_dir=None, verified=whole.facts.verified, digests=digests
        )
        infos = {n: TensorInfo(name=n, shape=tuple(s), dtype="F32") for n, s in whole.layout.shapes.items()}
        super().__init__(facts, infos, whole.files)

    def pieces(self, name: str) -> Pieces:
        """Return where the state of a parameter lies."""
        return self._whole.flat_pieces(name, self._state)


def _model_states(file: TorchArchive, first: TorchArchive, world_size: int) -> dict[str, Any]:
    """Return a rank's model states, after checking that they are of stage 3 and belong to rank 0's."""
    content = file.content
    if not isinstance(content, dict) or not isinstance(content.get("param_shapes"), list) or "module" not in content:
        raise CheckpointError(f"{file.path} is not a model states file of ZeRO stage 3 (no list 'param_shapes')")
    _check_name(file)
    written = content.get("dp_world_size", world_size)
    if written != world_size:
        raise CheckpointError(f"{file.path} was written by {written} ranks; the directory holds files of {world_size}")
    if content.get("mp_world_size", 1) != 1:
        raise CheckpointError(f"{file.path}: checkpoints split by model parallelism are not supported")
    for key in ("global_steps", "param_shapes", "frozen_param_shapes", "buffer_names"):
        if content.get(key) != first.content.get(key):
            raise CheckpointError(f"{file.path}: '{key}' differs from {first.path.name}; the files are of two saves")
    return content


def _check_name(file: TorchArchive) -> None:
    """Raise if a file was saved under another rank's name: torch writes the name into the archive."""
    inside, outside = _NAMED_RANK.search(file.root), _NAMED_RANK.search(file.path.stem)
    if inside and outside and inside.groups() != outside.groups():
        raise CheckpointError(
            f"{file.path} was saved as {file.root}.pt: a file of another rank was renamed or copied over this one"
        )


def _optim_states(file: TorchArchive, world_size: int) -> dict[str, Any]:
    """Return a rank's optimizer states, after checking that they are of stage 3 and of as many ranks."""
    states = file.content.get("optimizer_state_dict") if isinstance(file.content, dict) else None
    if not isinstance(states, dict) or "zero_stage" not in states:
        raise CheckpointError(f"{file.path} is not an optimizer states file of DeepSpeed ZeRO")
    _check_name(file)
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


def _open_rank(files: RankFiles, first: tuple[TorchArchive, TorchArchive], world_size: int) -> RankStates:
    """Open and check one rank's files, and keep where its values lie."""
    model = first[0] if files.model == first[0].path else open_archive(files.model)
    optim = first[1] if files.optim == first[1].path else open_archive(files.optim)
    content = _model_states(model, first[0], world_size)
    states = _optim_states(optim, world_size)["optimizer_state_dict"]
    reference = first[1].content["optimizer_state_dict"]
    flat = {WEIGHTS: tuple(place_of(optim, group) for group in states["fp32_flat_groups"])}
    inner, expected = (s.get("optimizer_state_dict") or {} for s in (states, reference))
    if inner.get("param_groups") != expected.get("param_groups"):
        raise CheckpointError(
            f"{optim.path}: 'param_groups' differs from {first[1].path.name}; the files are of two saves"
        )
    for state in _state_names(inner, [p.numel for p in flat[WEIGHTS]], optim.path):
        flat[state] = tuple(place_of(optim, inner["state"][index][state]) for index in range(len(flat[WEIGHTS])))
    if _scalar_values(inner, optim, flat) != _scalar_values(expected, first[1], flat):
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


def _state_names(inner: Mapping[str, Any], sizes: list[int], path: Path) -> list[str]:
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


def _scalar_values(
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
                item = TensorInfo(name="", shape=(), dtype=value.dtype).item_bytes
                scalars[name] = Scalar((value.shape, read_bytes(place.path, place.offset, item)), value.dtype)
            elif not isinstance(value, TensorRef):
                scalars[name] = Scalar(value)
        result.append(scalars)
    return result


def _parameter_groups(model: Mapping[str, Any], optim: Mapping[str, Any], path: Path) -> list[list[str]]:
    """Return the parameters of each optimizer group, by the sub-groups that the optimizer says it has."""
    names = [list(group) for group in model["param_shapes"]]
    inner = optim["optimizer_state_dict"].get("optimizer_state_dict") or {}
    groups = inner.get("param_groups")
    if not groups:
        return names
    listed = [group.get("params") for group in groups]
    flat = [index for params in listed for index in params]
    if flat != list(range(len(names))):
        raise CheckpointError(f"{path}: the optimizer's groups have sub-groups {listed}; there are {len(names)}")
    return [[name for index in params for name in names[index]] for params in listed]


def _scalars(
    groups: list[list[str]],
    optim: Mapping[str, Any],
    model: Mapping[str, Any],
    archive: TorchArchive,
    per_element: Iterable[str],
) -> list[dict[str, Scalar]]:
    """Return what the optimizer keeps once per sub-group, of each parameter group.

    Raises:
        CheckpointError: Sub-groups of one parameter group differ: no value would be right for both.
    """
    inner = optim["optimizer_state_dict"].get("optimizer_state_dict") or {}
    values = _scalar_values(inner, archive, per_element)
    if not values:
        return [{} for _ in groups]
    owner = {name: index for index, group in enumerate(model["param_shapes"]) for name in group}
    result = []
    for group in groups:
        found = [values[index] for index in dict.fromkeys(owner[name] for name in group)]
        if any(other != found[0] for other in found):
            raise CheckpointError(f"{archive.path}: the sub-groups of one parameter group are at different steps")
        result.append(found[0] if found else {})
    return result
