"""Laying out a native DeepSpeed ZeRO stage 3 checkpoint for any number of ranks.

DeepSpeed's plain ``load_checkpoint`` opens it: every rank gets its part of the weights and of each optimizer state, and
all else that the source had (settings of each parameter group, step, scheduler, buffers, frozen parameters, client
state). Its universal checkpoints are no part of this: at stage 3 they lose group settings, buffers and frozen
parameters.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

from checkpoints_tools.formats.torch_archive import ArchiveLayout, dumps
from checkpoints_tools.formats.zero3.optimizer_states import HeldTensor, Placeholder, TrainingStates
from checkpoints_tools.io.target import Documents, TargetPlan
from checkpoints_tools.io.target_file import TargetFile
from checkpoints_tools.io.tensor_stream import TensorJob
from statex_dist.checkpoint.dtypes import ITEM_BYTES
from statex_dist.checkpoint.formats.tensor_io import Piece, TensorInfo
from statex_dist.checkpoint.formats.torch_archive.pickle import Size, TensorRef, mapped, new_tensor
from statex_dist.checkpoint.formats.zero3.layout import FlatLayout, partition_size, rank_file_stem, shares, sub_groups
from statex_dist.checkpoint.formats.zero3.rank import WEIGHTS, Scalar
from statex_dist.checkpoint.history import Span, history_text
from statex_dist.checkpoint.layout import HISTORY_NAME, LATEST_NAME, MODEL_DIR, tag_of

_KINDS = ("model", "optim")


def zero3_plan(
    training: TrainingStates,
    jobs: Sequence[TensorJob],
    world_size: int,
    *,
    documents: Documents,
    info: dict[str, Any],
    history: Sequence[Span] = (),
) -> TargetPlan:
    """Lay a training checkpoint out for ``world_size`` ranks.

    Args:
        training: Everything but the tensors, and which tensors there are.
        jobs: The weights: trained and frozen parameters and buffers, no tied names.
        world_size: Number of ranks.
        documents: Makes the small files of the model (``config.json``), by name.
        info: Facts for the manifest.
        history: Settings of the steps of the training.
    """
    layout = _Layout(training, world_size)
    by_name = {job.info.name: job for job in jobs}
    remembered = [
        TensorJob(
            info=replace(by_name[name].info, dtype="F32"),
            source=None if (source := by_name[name].source) is None else replace(source, dtype="F32"),
            mapping=by_name[name].mapping,
            state=state,
        )
        for state in training.states
        for name in layout.flat.shapes
    ]
    folder = tag_of(training.step)
    files = [layout.files(rank, folder) for rank in range(world_size)]

    def in_folder(written: Mapping[str, Any]) -> dict[str, Any]:
        found = {f"{folder}/{MODEL_DIR}/{name}": content for name, content in documents(written).items()}
        return {**found, f"{folder}/{HISTORY_NAME}": history_text(history)} if history else found

    def places(job: TensorJob) -> Sequence[Piece]:
        return layout.places(job, folder)

    return TargetPlan(
        kind="zero3",
        files=[file for of_rank in files for file in of_rank],
        jobs=[*jobs, *remembered],
        places=places,
        documents=in_folder,
        info={
            **info,
            "step": training.step,
            "world_size": world_size,
            # Nothing inside an optimizer file says of which rank it is.
            "rank_files": [[Path(file.name).name for file in of_rank] for of_rank in files],
        },
        folder=folder,
        model_folder=f"{folder}/{MODEL_DIR}" if documents({}) else folder,
        markers={LATEST_NAME: folder},
    )


@dataclass(frozen=True, slots=True)
class _Storage:
    """Key, dtype and number of elements of a storage that tensors are copied into."""

    key: str
    dtype: str
    numel: int

    @property
    def nbytes(self) -> int:
        return self.numel * ITEM_BYTES[self.dtype]


_Pickled = tuple[bytes, Mapping[str, int | bytes]]
"""A pickle and the storages of its tensors."""


class _Layout:
    """Where everything goes in the two files of each rank."""

    def __init__(self, training: TrainingStates, world_size: int):
        self._training, self._world_size = training, world_size
        self._known_places: dict[tuple[str, str], tuple[list[Path], list[list[int]]]] = {}
        self._pickles: list[tuple[Mapping[str, Any], bool, _Pickled]] = []
        cut = sub_groups(training.groups, world_size, training.sub_group_size)
        self._owners = [index for index, group in enumerate(cut) for _ in group]
        shapes = {name: shape for group in training.groups for name, shape in group.items()}
        self._sub_groups = [{name: shapes[name] for name in names} for group in cut for names in group]
        self._sizes = [
            sum(partition_size(math.prod(shape), world_size) for shape in group.values()) for group in self._sub_groups
        ]
        self.flat = FlatLayout.build(
            {name: shape for group in self._sub_groups for name, shape in group.items()},
            self._sizes,
            world_size,
            where=Path("target"),
        )
        self._flat_storages = {
            state: [
                _Storage(f"{index}", "F32", size) for index, size in enumerate(self._sizes, number * len(self._sizes))
            ]
            for number, state in enumerate((WEIGHTS, *training.states))
        }
        self._model_storages = {
            name: _Storage(str(index), item.dtype, self._stored(name))
            for index, (name, item) in enumerate({**training.buffers, **training.frozen}.items())
        }
        # The archive's folder has the file's name, and so ranks of more digits have their storages elsewhere.
        self._files = {(rank, kind): self._laid_out(rank, kind) for rank in range(world_size) for kind in _KINDS}

    def _stored(self, name: str) -> int:
        if name in self._training.buffers:
            return self._training.buffers[name].numel
        return partition_size(self._training.frozen[name].numel, self._world_size)

    def _stem(self, rank: int, kind: str) -> str:
        return rank_file_stem(rank, kind, self._training.prefix)

    def _archive(self, rank: int, kind: str) -> ArchiveLayout:
        """Lay out one file."""
        pickled, storages = self._model_pickle(rank) if kind == "model" else self._optim_pickle
        return ArchiveLayout.build(self._stem(rank, kind), pickled, storages)

    @cached_property
    def _optim_pickle(self) -> _Pickled:
        content, storages = self._optim_content()
        return dumps(content), storages

    def _model_pickle(self, rank: int) -> _Pickled:
        """Return the pickle of a rank's model states: that of another rank, if they are the same."""
        client = self._training.client(rank)
        for known, is_first, found in self._pickles:
            if known is client and is_first is (rank == 0):
                return found
        content, storages = self._model_content(rank)
        found = dumps(content), storages
        self._pickles = [*self._pickles[-1:], (client, rank == 0, found)]
        return found

    def _laid_out(self, rank: int, kind: str) -> tuple[int, dict[str, tuple[int, int]]]:
        """Return the size of a file, and offset and size of its storages."""
        archive = self._archive(rank, kind)
        return archive.size, dict(archive.storages)

    def _offset(self, rank: int, kind: str, storage: _Storage) -> int:
        return self._files[rank, kind][1][storage.key][0]

    def files(self, rank: int, folder: str) -> list[TargetFile]:
        """Return the two files of a rank."""
        result = []
        for kind in _KINDS:
            size, storages = self._files[rank, kind]
            result.append(
                TargetFile(
                    name=f"{folder}/{self._stem(rank, kind)}.pt",
                    size=size,
                    archives=((0, partial(self._archive, rank, kind)),),
                    storages=tuple(storages.values()),
                )
            )
        return result

    def places(self, job: TensorJob, folder: str) -> list[Piece]:
        """Return where a tensor goes: a buffer to every rank, all else in parts."""
        name = job.info.name
        if name in self._model_storages:
            return self._model_places(name, job.info, folder)
        found = []
        paths, offsets = self._flat_places(job.state or WEIGHTS, folder)
        for rank, group, start, target, numel in self.flat.runs(name):
            found.append(Piece(paths[rank], offsets[rank][group] + 4 * start, target, target + numel))
        return found

    def _flat_places(self, state: str, folder: str) -> tuple[list[Path], list[list[int]]]:
        """Return the optimizer file of each rank, and the bytes at which the flat groups of a state begin in it."""
        ranks, key = range(self._world_size), (state, folder)
        if key not in self._known_places:
            storages = self._flat_storages[state]
            offsets = [[self._offset(rank, "optim", storage) for storage in storages] for rank in ranks]
            # Paths are made once: a piece's file is looked up by the hash of its path, which the path keeps.
            known = next((paths for (_, other), (paths, _) in self._known_places.items() if other == folder), None)
            paths = known or [Path(folder, f"{self._stem(rank, 'optim')}.pt") for rank in ranks]
            self._known_places[key] = paths, offsets
        return self._known_places[key]

    def _model_places(self, name: str, info: TensorInfo, folder: str) -> list[Piece]:
        if name in self._training.buffers:
            held = [(rank, 0, info.numel) for rank in range(self._world_size)]
        else:
            held = list(shares(info.numel, self._world_size))
        return [
            Piece(
                Path(folder, f"{self._stem(rank, 'model')}.pt"),
                self._offset(rank, "model", self._model_storages[name]),
                *(start, stop),
            )
            for rank, start, stop in held
        ]

    def _model_content(self, rank: int) -> tuple[dict[str, Any], dict[str, int | bytes]]:
        """Return a rank's model states and their storages."""
        training, storages = self._training, _Storages(len(self._model_storages))
        for storage in self._model_storages.values():
            storages.sizes[storage.key] = storage.nbytes
        module: OrderedDict[str, Any] = OrderedDict()
        for name, entry in training.module.items():
            if name in training.buffers:
                buffer = training.buffers[name]
                module[name] = new_tensor(self._model_storages[name].key, buffer.dtype, buffer.shape)
            else:
                is_parameter = isinstance(entry, Placeholder)
                module[name] = storages.empty(entry.dtype) if is_parameter else storages.carried(entry)
        frozen = {name: item.shape for name, item in training.frozen.items()}
        fragments = OrderedDict(
            (name, new_tensor(self._model_storages[name].key, item.dtype, (self._stored(name),)))
            for name, item in training.frozen.items()
        )
        content = {
            **{key: storages.carried(value) for key, value in training.client(rank).items()},
            "module": module,
            "param_shapes": [_sizes(group) for group in self._sub_groups],
            "frozen_param_shapes": None if training.frozen_excluded else _sizes(frozen),
            "frozen_param_fragments": None if training.frozen_excluded else fragments,
            "shared_params": dict(training.shared) if rank == 0 else {},
            "dp_world_size": self._world_size,
        }
        return content, storages.sizes

    def _optim_content(self) -> tuple[dict[str, Any], dict[str, int | bytes]]:
        """Return the optimizer states, the same for every rank but for the values, and their storages."""
        training = self._training
        storages = _Storages(sum(len(group) for group in self._flat_storages.values()))
        for states in self._flat_storages.values():
            for storage in states:
                storages.sizes[storage.key] = storage.nbytes
        flat = {
            state: [new_tensor(storage.key, "F32", (storage.numel,)) for storage in group]
            for state, group in self._flat_storages.items()
        }
        per_group: dict[int, dict[str, Any]] = {}
        if training.states or any(training.scalars):
            for index, owner in enumerate(self._owners):
                per_group[index] = {
                    **{name: storages.scalar(value) for name, value in training.scalars[owner].items()},
                    **{state: flat[state][index] for state in training.states},
                }
        groups = [
            {**{key: storages.carried(v) for key, v in settings.items()}, "params": self._indices(index)}
            for index, settings in enumerate(training.settings)
        ]
        top = {key: storages.carried(value) for key, value in training.optim.items()}
        states_of = {key: storages.carried(value) for key, value in training.optimizer.items()}
        states_of["partition_count"] = self._world_size
        states_of["optimizer_state_dict"] = {"state": per_group, "param_groups": groups}
        states_of["fp32_flat_groups"] = flat[WEIGHTS]
        return {**top, "optimizer_state_dict": states_of}, storages.sizes

    def _indices(self, group: int) -> list[int]:
        return [index for index, owner in enumerate(self._owners) if owner == group]


def _sizes(shapes: Mapping[str, tuple[int, ...]]) -> OrderedDict[str, Size]:
    return OrderedDict((name, Size(shape)) for name, shape in shapes.items())


class _Storages:
    """Storages of a file besides those that tensors are copied into: their bytes are known now."""

    def __init__(self, first: int):
        self.sizes: dict[str, int | bytes] = {}
        self._next = first
        self._empty = lru_cache(maxsize=None)(lambda dtype: self._add(b""))

    def _add(self, data: bytes) -> str:
        key, self._next = str(self._next), self._next + 1
        self.sizes[key] = data
        return key

    def empty(self, dtype: str) -> TensorRef:
        """Return the placeholder that stands for a parameter: its values are in the flat groups."""
        return new_tensor(self._empty(dtype), dtype, (0,))

    def scalar(self, value: Scalar) -> Any:
        """Return a value that the optimizer keeps once per sub-group, in a storage of its own."""
        if value.dtype is None:
            return value.value
        shape, data = value.value
        return new_tensor(self._add(data), value.dtype, shape)

    def carried(self, value: Any) -> Any:
        """Return a value with the tensors in it moved to storages of this file."""
        return mapped(value, self._moved)

    def _moved(self, value: Any) -> Any:
        assert not isinstance(value, TensorRef), f"{value} belongs to another file"
        if not isinstance(value, HeldTensor):
            return value
        return new_tensor(self._add(value.data), value.dtype, value.shape)
