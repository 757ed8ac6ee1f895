"""Logical tensors out of a native DeepSpeed ZeRO stage 3 checkpoint, without importing deepspeed or torch.

The reader returns the same as DeepSpeed's own ``zero_to_fp32``: fp32 master weights of the trained parameters, frozen
parameters in their own dtype, buffers and tied names. It also returns the optimizer's states, and it checks that the
files belong together; ``zero_to_fp32`` does neither. Of each rank only the places of its storages are kept, so that a
thousand ranks fit in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from statex_dist.checkpoint.dtypes import FLOATS
from statex_dist.checkpoint.formats.tensor_io import Piece, Pieces, SourceFacts, TensorInfo, TensorSource
from statex_dist.checkpoint.formats.torch_archive.pickle import TensorRef
from statex_dist.checkpoint.formats.torch_archive.reader import whole_pieces
from statex_dist.checkpoint.formats.torch_archive.zip import TorchArchive, open_archive
from statex_dist.checkpoint.formats.zero3.layout import FlatLayout, find_rank_files, partition_size, shares
from statex_dist.checkpoint.formats.zero3.rank import (
    WEIGHTS,
    Scalar,
    base_states,
    model_states,
    open_rank,
    optim_states,
    scalar_values,
)
from statex_dist.errors import CheckpointError


class Zero3Source(TensorSource):
    """One tag of a ZeRO-3 checkpoint.

    Attributes:
        world_size: Number of ranks.
        ranks: Where each rank's values lie.
        layout: How the trained parameters are cut.
        frozen: Shape of each frozen parameter.
        filled: Frozen parameters that are not in the tag; their values come from the weights beside it.
        frozen_excluded: Whether it was saved with ``exclude_frozen_parameters``, and nothing is filled.
        groups: Names of the parameters of each optimizer group, in flat order.
        scalars: Values that the optimizer keeps once per parameter group, by its names.
        model: Contents of rank 0's model states.
        optim: Contents of rank 0's optimizer states.
        first: Rank 0's model states, opened.

    Args:
        directory: The tag's directory, with two files a rank.
        facts: Facts about the checkpoint.
        only_first: Whether to open rank 0's files alone: enough to identify the checkpoint, not to read it.
        beside: Weights that lie beside the tag.

    Raises:
        CheckpointError: A file is missing, damaged, refused, or the files do not belong together.
    """

    def __init__(
        self, directory: Path, facts: SourceFacts, *, only_first: bool = False, beside: TensorSource | None = None
    ):
        files = find_rank_files(directory)
        world_size = self.world_size = len(files)
        first = open_archive(files[0].model), open_archive(files[0].optim)
        self.model: dict[str, Any] = model_states(first[0], first[0], world_size)
        self.optim: dict[str, Any] = optim_states(first[1], world_size)
        self.ranks = [open_rank(rank, first, world_size) for rank in (files[:1] if only_first else files)]
        shapes = {name: tuple(shape) for group in self.model["param_shapes"] for name, shape in group.items()}
        sizes = [piece.numel for piece in self.ranks[0].flat[WEIGHTS]]
        for rank in self.ranks:
            for state, pieces in rank.flat.items():
                if [piece.numel for piece in pieces] != sizes:
                    raise CheckpointError(
                        f"{rank.files.optim}: the flat groups of its {state} differ in size from those of rank 0"
                    )
        self.layout = FlatLayout.build(shapes, sizes, world_size, where=directory)
        self.groups = parameter_groups(self.model, self.optim, first[1].path)
        self.scalars = _scalars(self.groups, self.optim, self.model, first[1], self.ranks[0].flat)
        frozen = {name: tuple(shape) for name, shape in (self.model.get("frozen_param_shapes") or {}).items()}
        self._check_frozen(frozen)
        fragments = self.model.get("frozen_param_fragments") or {}
        module = self.model["module"]
        self.first = first[0]
        self._buffers: dict[str, TensorRef] = {
            name: module[name] for name in self.model["buffer_names"] if isinstance(module.get(name), TensorRef)
        }
        filled = missing_frozen(self.model, module, shapes, beside)
        infos = {
            **filled,
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
        facts = replace(facts, info={**facts.info, **told})
        paths = [path for rank in files for path in (rank.model, rank.optim)]
        paths += beside.files if beside is not None and filled else []
        super().__init__(facts, infos, paths, aliases=aliases, buffers=self._buffers)
        self._owners = aliases
        self.frozen = {**frozen, **{name: info.shape for name, info in filled.items()}}
        self.filled, self._beside = frozenset(filled), beside
        self.frozen_excluded = _excludes_frozen(self.model) and not filled
        self._flat = {
            state: [[(group.path, group.offset) for group in rank.flat[state]] for rank in self.ranks]
            for state in self.ranks[0].flat
        }
        self._states = {state: Zero3StateSource(self, state) for state in self.ranks[0].flat if state != WEIGHTS}

    def _check_frozen(self, frozen: Mapping[str, tuple[int, ...]]) -> None:
        """Raise unless every rank holds its fragment of every frozen parameter."""
        for name, shape in frozen.items():
            part = partition_size(math.prod(shape), self.world_size)
            for rank in self.ranks:
                held = rank.frozen[name].numel if name in rank.frozen else 0
                if held != part:
                    found = f"{held} elements" if held else "nothing"
                    raise CheckpointError(
                        f"{rank.files.model}: frozen parameter '{name}' needs {part} elements here; found {found}"
                    )

    def stored_pieces(self, name: str) -> Pieces:
        """Return where a tensor lies, in the files of all ranks."""
        name = self._owners.get(name, name)
        if name in self.filled and self._beside is not None:
            return self._beside.pieces(name)
        if name in self._buffers:
            return whole_pieces(self.first, self._buffers[name])
        if name in self.frozen:
            return self._frozen_pieces(name)
        return self.flat_pieces(name, WEIGHTS)

    def flat_pieces(self, name: str, state: str) -> Pieces:
        """Return where a trained parameter, or what the optimizer remembers of it, lies."""
        flat = self._flat[state]
        pieces = []
        for rank, group, start, target, numel in self.layout.runs(name):
            path, offset = flat[rank][group]
            pieces.append(Piece(path, offset + 4 * start, target, target + numel))
        return pieces

    def _frozen_pieces(self, name: str) -> Pieces:
        held = [rank.frozen[name] for rank in self.ranks]
        return [
            Piece(held[rank].path, held[rank].offset, start, stop)
            for rank, start, stop in shares(math.prod(self.frozen[name]), self.world_size)
        ]

    def natural_dtype(self, name: str) -> str:
        """Return the dtype of an export: DeepSpeed's own converter stores floating-point buffers as fp32 too."""
        dtype = self.info(name).dtype
        return "F32" if name in self.buffers and dtype in FLOATS else dtype

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
    """One optimizer state of every trained parameter of a ZeRO-3 checkpoint.

    Args:
        whole: The checkpoint.
        state: Name of the state.
    """

    def __init__(self, whole: Zero3Source, state: str):
        self._whole, self._state = whole, state
        facts = replace(whole.facts, model_dir=None, digests=whole.facts.state_digests.get(state, {}))
        infos = {n: TensorInfo(name=n, shape=tuple(s), dtype="F32") for n, s in whole.layout.shapes.items()}
        super().__init__(facts, infos, whole.files)

    def stored_pieces(self, name: str) -> Pieces:
        """Return where the state of a parameter lies."""
        return self._whole.flat_pieces(name, self._state)


def _excludes_frozen(model: Mapping[str, Any]) -> bool:
    """Return whether model states were saved with ``exclude_frozen_parameters``: DeepSpeed then writes None."""
    return "frozen_param_shapes" in model and model["frozen_param_shapes"] is None


def missing_frozen(
    model: Mapping[str, Any], module: Mapping[str, Any], shapes: Mapping[str, Any], beside: TensorSource | None
) -> dict[str, TensorInfo]:
    """Return the tensors that a tag without its frozen parameters lacks, of those that lie beside it."""
    if beside is None or not _excludes_frozen(model):
        return {}
    held = {*shapes, *module, *(model.get("shared_params") or {})}
    return {name: beside.info(name) for name in beside.owned() if name not in held and beside.info(name).numel}


def parameter_groups(model: Mapping[str, Any], optim: Mapping[str, Any], path: Path) -> list[list[str]]:
    """Return the parameters of each optimizer group, by the sub-groups that the optimizer says it has.

    Args:
        model: Contents of a rank's model states.
        optim: Contents of its optimizer states.
        path: The latter's file, for the message.

    Raises:
        CheckpointError: The optimizer has other sub-groups than the model states.
    """
    names = [list(group) for group in model["param_shapes"]]
    groups = base_states(optim).get("param_groups")
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
    values = scalar_values(base_states(optim), archive, per_element)
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
