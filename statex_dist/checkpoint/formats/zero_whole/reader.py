"""Logical tensors out of a DeepSpeed checkpoint of ZeRO stage 0, 1 or 2.

Trained parameters are the fp32 master weights: in stages 1 and 2 each optimizer group is one flat run of its
parameters, in the order of ``param_shapes``, cut into equal partitions over the ranks. Frozen parameters, buffers and,
in stage 0, everything come from the whole model in ``mp_rank_00_model_states.pt``. ``zero_to_fp32`` of DeepSpeed
returns the same values; it leaves out frozen parameters of stage 1, and does not read stage 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from statex_dist.checkpoint.dtypes import FLOATS
from statex_dist.checkpoint.formats.tensor_io import Piece, Pieces, SourceFacts, TensorInfo, TensorSource
from statex_dist.checkpoint.formats.torch_archive.pickle import TensorRef
from statex_dist.checkpoint.formats.torch_archive.reader import place_of, whole_pieces
from statex_dist.checkpoint.formats.torch_archive.zip import TorchArchive, open_archive
from statex_dist.checkpoint.formats.zero3.rank import WEIGHTS, scalar_values, state_names
from statex_dist.checkpoint.formats.zero3.reader import missing_frozen
from statex_dist.checkpoint.formats.zero_whole.files import (
    MODEL_NAME,
    base_states,
    client_files,
    open_model,
    optim_files,
    optim_states,
    stage_in,
)
from statex_dist.errors import CheckpointError

_ALIGNMENT = 2
"""A flat group is padded to a multiple of this times the ranks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FlatGroups:
    """Where the trained parameters lie, in stages 1 and 2.

    Attributes:
        places: Group and first element in it of each parameter.
        partitions: Per state (the weights too) and group, the partition of each rank: a piece of all its elements.
        ends: Per group the ends of the ranks' partitions, from 0.
    """

    places: Mapping[str, tuple[int, int]]
    partitions: Mapping[str, Sequence[Sequence[Piece]]]
    ends: Sequence[Sequence[int]]

    def pieces(self, name: str, numel: int, state: str) -> Pieces:
        """Return where a parameter, or what the optimizer remembers of it, lies."""
        group, position = self.places[name]
        pieces = []
        for rank, (begin, end) in enumerate(pairwise(self.ends[group])):
            first, last = max(position, begin), min(position + numel, end)
            if first < last:
                held = self.partitions[state][group][rank]
                offset = held.offset + 4 * (first - begin)
                pieces.append(Piece(held.path, offset, first - position, last - position))
        return pieces


class WholeZeroSource(TensorSource):
    """One tag of a checkpoint of ZeRO stage 0, 1 or 2.

    Attributes:
        stage: The stage.
        world_size: Number of ranks.
        filled: Frozen parameters that are not in the tag; their values come from the weights beside it.

    Args:
        directory: The tag's directory.
        facts: Facts about the checkpoint.
        beside: Weights that lie beside the tag.

    Raises:
        CheckpointError: A file is missing, damaged, refused, or the files do not belong together.
    """

    def __init__(self, directory: Path, facts: SourceFacts, *, beside: TensorSource | None = None):
        self._model = open_model(directory / MODEL_NAME)
        content = self._model.content
        files = optim_files(directory)
        self.world_size = len(files) or content.get("dp_world_size", 1)
        optims = [open_archive(path) for path in files]
        self.stage = stage_in(optims[0]) if optims else 0
        clients = client_files(directory)
        self._archives = [self._model, *optims, *map(open_archive, clients)]
        shapes = [{n: tuple(shape) for n, shape in group.items()} for group in content.get("param_shapes") or []]
        self._trained = {name: shape for group in shapes for name, shape in group.items()}
        self._flat = _flat_groups(shapes, optims, len(files), directory) if optims else None
        whole = {} if files else _whole_states(content.get("optimizer"), shapes, self._model)
        module: Mapping[str, TensorRef] = content["module"]
        buffers = [name for name in content.get("buffer_names") or () if isinstance(module.get(name), TensorRef)]
        aliases = _aliases(content, module)
        filled = missing_frozen(content, module, self._trained, beside)
        infos = {
            **filled,
            **{n: TensorInfo(name=n, shape=t.shape, dtype=t.dtype) for n, t in module.items()},
            **{n: TensorInfo(name=n, shape=s, dtype="F32") for n, s in self._trained.items() if files},
        }
        for alias, owner in aliases.items():
            infos[alias] = replace(infos[owner], name=alias)
        told = {
            "step": content.get("global_steps"),
            "world_size": self.world_size,
            "ds_version": content.get("ds_version"),
            "zero_stage": self.stage,
        }
        facts = replace(facts, info={**facts.info, **told})
        paths = [directory / MODEL_NAME, *files, *clients, *(beside.files if beside is not None and filled else [])]
        super().__init__(facts, infos, paths, aliases=aliases, buffers=buffers)
        self._module, self._owners = module, aliases
        self.filled, self._beside = frozenset(filled), beside
        states = self._flat.partitions if self._flat else whole
        self._states = {state: _WholeZeroState(self, state, whole.get(state)) for state in states if state != WEIGHTS}

    def stored_pieces(self, name: str) -> Pieces:
        """Return where a tensor lies: in the ranks' partitions, or in the whole model."""
        name = self._owners.get(name, name)
        if name in self.filled and self._beside is not None:
            return self._beside.pieces(name)
        if self._flat is not None and name in self._trained:
            return self.flat_pieces(name, WEIGHTS)
        return whole_pieces(self._model, self._module[name])

    def flat_pieces(self, name: str, state: str) -> Pieces:
        """Return where a trained parameter, or what the optimizer remembers of it, lies in stages 1 and 2."""
        assert self._flat is not None
        return self._flat.pieces(name, math.prod(self._trained[name]), state)

    def whole_state(self, tensor: TensorRef) -> Pieces:
        """Return where an optimizer state lies in stage 0."""
        return whole_pieces(self._model, tensor)

    @property
    def trained(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of the trained parameters; empty where a foreign checkpoint of stage 0 does not say which are."""
        return self._trained

    def natural_dtype(self, name: str) -> str:
        """Return the dtype of an export: DeepSpeed's own converter stores floating-point buffers as fp32 too."""
        dtype = self.info(name).dtype
        return "F32" if name in self.buffers and dtype in FLOATS else dtype

    def archives(self) -> Iterable[TorchArchive]:
        """Return every file of the tag."""
        return self._archives

    def states(self) -> Mapping[str, TensorSource]:
        """Return the optimizer's states that have a value per element, such as ``exp_avg``."""
        return self._states


class _WholeZeroState(TensorSource):
    """One optimizer state of every trained parameter.

    Args:
        whole: The checkpoint.
        state: Name of the state.
        tensors: In stage 0 the tensors by parameter.
    """

    def __init__(self, whole: WholeZeroSource, state: str, tensors: Mapping[str, TensorRef] | None):
        self._whole, self._state, self._tensors = whole, state, tensors
        facts = replace(whole.facts, model_dir=None, digests=whole.facts.state_digests.get(state, {}))
        infos = {n: TensorInfo(name=n, shape=tuple(s), dtype="F32") for n, s in whole.trained.items()}
        super().__init__(facts, infos, whole.files)

    def stored_pieces(self, name: str) -> Pieces:
        """Return where the state of a parameter lies."""
        if self._tensors is not None:
            return self._whole.whole_state(self._tensors[name])
        return self._whole.flat_pieces(name, self._state)


def _aliases(content: Mapping[str, Any], module: Mapping[str, TensorRef]) -> dict[str, str]:
    """Return the tied names of a model, each with the name of its owner."""
    shared = content.get("shared_params")
    if shared is not None:
        return {alias: owner for alias, owner in shared.items() if owner in module}
    owners: dict[TensorRef, str] = {}  # a foreign checkpoint of stage 0: tied names are one tensor in the file
    return {n: owners[t] for n, t in module.items() if owners.setdefault(t, n) != n and t.numel}


def _flat_groups(
    shapes: Sequence[Mapping[str, tuple[int, ...]]], optims: Sequence[TorchArchive], world_size: int, where: Path
) -> FlatGroups:
    """Lay the trained parameters out over the ranks' partitions.

    Raises:
        CheckpointError: The partitions do not hold the parameters, or files are of two saves.
    """
    ranks = [optim_states(optim, world_size) for optim in optims]
    weights = [rank["single_partition_of_fp32_groups"] for rank in ranks]
    if any(len(partitions) != len(shapes) for partitions in weights):
        raise CheckpointError(f"{where}: the optimizer has {len(weights[0])} groups, the model states {len(shapes)}")
    held = [[_place(optim, group) for group in groups] for optim, groups in zip(optims, weights, strict=True)]
    partitions: dict[str, list[list[Piece]]] = {WEIGHTS: [list(ranks) for ranks in zip(*held, strict=True)]}
    first = base_states(ranks[0], optims[0].path)
    names: list[str] | None = None
    for optim, states in zip(optims, ranks, strict=True):
        inner = base_states(states, optim.path)
        # Its states have the whole partition, padding and all.
        sizes = [_state_size(inner, index) for index in range(len(shapes))]
        found = state_names(inner, sizes, optim.path)
        names = found if names is None else names
        for what, ours, other in (
            ("param_groups", inner.get("param_groups"), first.get("param_groups")),
            ("states", found, names),
            ("step", scalar_values(inner, optim, found), scalar_values(first, optims[0], names)),
        ):
            if ours != other:
                raise CheckpointError(
                    f"{optim.path}: the optimizer's {what} differ from {optims[0].path.name}: files of two saves"
                )
        for name in found:
            groups = partitions.setdefault(name, [[] for _ in shapes])
            for index, group in enumerate(groups):
                group.append(_place(optim, inner["state"][index][name]))
    ends = [[0, *accumulate(piece.numel for piece in group)] for group in partitions[WEIGHTS]]
    places, paddings = {}, ranks[0].get("param_alignment_paddings")
    for index, named in enumerate(shapes):
        between = paddings[index] if paddings else [0] * len(named)
        position = 0
        for (name, shape), padding in zip(named.items(), between, strict=True):
            places[name] = (index, position)
            position += math.prod(shape) + padding
        if not 0 <= ends[index][-1] - position < _ALIGNMENT * world_size:
            raise CheckpointError(
                f"{where}: the {len(named)} parameters of group {index} have {position} elements; the partitions of "
                f"{world_size} ranks hold {ends[index][-1]}"
            )
    for name, groups in partitions.items():
        for group, sizes in zip(groups, ends, strict=True):
            if any(piece.numel < end - begin for piece, (begin, end) in zip(group, pairwise(sizes), strict=True)):
                raise CheckpointError(f"{where}: the optimizer's state '{name}' is shorter than its weights")
    return FlatGroups(places=places, partitions=partitions, ends=ends)


def _place(archive: TorchArchive, tensor: TensorRef) -> Piece:
    """Return where a partition lies; one without elements has no storage that matters."""
    return place_of(archive, tensor) if tensor.numel else Piece(archive.path, 0, 0, 0)


def _state_size(inner: Mapping[str, Any], index: int) -> int:
    """Return the elements of an optimizer group's states: those of its largest tensor."""
    values = (inner.get("state") or {}).get(index) or {}
    return max((v.numel for v in values.values() if isinstance(v, TensorRef)), default=0)


def _whole_states(
    optimizer: Any, shapes: Sequence[Mapping[str, tuple[int, ...]]], archive: TorchArchive
) -> dict[str, dict[str, TensorRef]]:
    """Return the optimizer's states with a value per element, in stage 0: by state and parameter.

    Raises:
        CheckpointError: The groups are not those of the model states.
    """
    states, groups = (optimizer or {}).get("state") or {}, (optimizer or {}).get("param_groups") or []
    if not states or not shapes:
        return {}
    if [len(group["params"]) for group in groups] != [len(group) for group in shapes]:
        raise CheckpointError(f"{archive.path}: the optimizer's groups are not those of the model")
    result: dict[str, dict[str, TensorRef]] = {}
    for group, named in zip(groups, shapes, strict=True):
        for index, (name, shape) in zip(group["params"], named.items(), strict=True):
            for state, value in states.get(index, {}).items():
                if isinstance(value, TensorRef) and value.shape == shape and shape != ():
                    result.setdefault(state, {})[name] = value
    total = sum(map(len, shapes))
    if partial := [state for state, tensors in result.items() if len(tensors) != total]:
        raise CheckpointError(f"{archive.path}: the optimizer's state '{partial[0]}' is not there for every parameter")
    return result
