"""Logical tensors out of a native DeepSpeed ZeRO stage 3 checkpoint, without importing deepspeed.

What DeepSpeed's own ``zero_to_fp32`` gives, one tensor at a time: fp32 master weights of the trained parameters, frozen
parameters in the dtype that they have, buffers (floating-point ones as fp32) and tied names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from checkpoints_tools.pickle_io import TorchFile, bytes_of, dtype_of
from checkpoints_tools.tensor_io import SourceFacts, TensorInfo
from checkpoints_tools.zero3_layout import FlatLayout, find_rank_files, partition_size
from statex_dist.errors import CheckpointError


class Zero3Source:
    """One tag of a ZeRO-3 checkpoint.

    Args:
        directory: The tag's directory, with two files a rank.
        model_dir: Directory with ``config.json``, if the checkpoint has one.
        verified: Whether the caller has verified the files against a manifest.
        info: Further facts of the writer.

    Raises:
        CheckpointError: A file is missing, damaged, refused, or the files do not belong together.
    """

    def __init__(
        self, directory: Path, *, model_dir: Path | None, verified: bool = False, info: dict[str, Any] | None = None
    ):
        files = find_rank_files(directory)
        self._model = [TorchFile(rank.model) for rank in files]
        self._optim = [TorchFile(rank.optim) for rank in files]
        world_size = len(files)
        for file in self._model:
            _check_model_states(file, self._model[0], world_size)
        self._groups = [_flat_groups(file, world_size) for file in self._optim]
        sizes = [group.numel() for group in self._groups[0]]
        for file, groups in zip(self._optim, self._groups, strict=True):
            if [group.numel() for group in groups] != sizes:
                raise CheckpointError(f"{file.path}: its flat groups differ in size from those of rank 0")
        first = self._model[0].content
        shapes = {n: tuple(shape) for group in first["param_shapes"] for n, shape in group.items()}
        self._layout = FlatLayout.build(shapes, sizes, world_size, where=directory)
        self._buffers = {name: first["module"][name] for name in first["buffer_names"] if name in first["module"]}
        self._frozen = {name: tuple(shape) for name, shape in (first.get("frozen_param_shapes") or {}).items()}
        self._check_frozen()
        self._infos = {
            **{n: _info(n, b.shape, "F32" if b.is_floating_point() else dtype_of(b)) for n, b in self._buffers.items()},
            **{n: _info(n, s, dtype_of(first["frozen_param_fragments"][n])) for n, s in self._frozen.items()},
            **{n: _info(n, s, "F32") for n, s in shapes.items()},
        }
        shared = dict(first.get("shared_params") or {})
        self._aliases = {a: owner for a, owner in shared.items() if owner in self._infos and a not in self._infos}
        for alias, owner in self._aliases.items():
            self._infos[alias] = _info(alias, self._infos[owner].shape, self._infos[owner].dtype)
        facts = {"step": first.get("global_steps"), "world_size": world_size, "ds_version": first.get("ds_version")}
        self._facts = SourceFacts(
            kind="zero3", path=directory, model_dir=model_dir, verified=verified, info={**(info or {}), **facts}
        )

    def _check_frozen(self) -> None:
        """Raise unless every rank holds its fragment of every frozen parameter."""
        for name, shape in self._frozen.items():
            part = partition_size(torch.Size(shape).numel(), len(self._model))
            for file in self._model:
                fragment = (file.content.get("frozen_param_fragments") or {}).get(name)
                if fragment is None or fragment.numel() != part:
                    held = "nothing" if fragment is None else f"{fragment.numel()} elements"
                    raise CheckpointError(
                        f"{file.path}: frozen parameter '{name}' needs {part} elements here; found {held}"
                    )

    @property
    def facts(self) -> SourceFacts:
        """What is known about the checkpoint."""
        return self._facts

    @property
    def aliases(self) -> Mapping[str, str]:
        """Tied names and their owners."""
        return self._aliases

    def keys(self) -> list[str]:
        """Return all names: buffers, frozen, trained, tied (DeepSpeed's order)."""
        return list(self._infos)

    def info(self, name: str) -> TensorInfo:
        """Return shape and dtype of a tensor."""
        return self._infos[name]

    @property
    def files(self) -> list[Path]:
        """Both files of every rank."""
        return [file.path for pair in zip(self._model, self._optim, strict=True) for file in pair]

    def read_into(self, name: str, start: int, view: memoryview) -> None:
        """Fill ``view`` with the bytes of a tensor from byte ``start`` on, gathered from all ranks."""
        name = self._aliases.get(name, name)
        info = self._infos[name]
        item = info.item_bytes
        if name in self._buffers:
            value = self._buffers[name]
            whole = bytes_of(value.float() if value.is_floating_point() else value)
            view[:] = whole[start : start + len(view)]
            return
        first, stop = start // item, (start + len(view)) // item
        for target, numel, read in self._parts(name, info):
            begin, end = max(first, target), min(stop, target + numel)
            if begin < end:
                read(view[(begin - first) * item : (end - first) * item], (begin - target) * item)

    def _parts(self, name: str, info: TensorInfo) -> Iterator[tuple[int, int, Callable[[memoryview, int], None]]]:
        """Yield each rank's run of a tensor: first element, number, and a reader of bytes within the run."""
        if name in self._frozen:
            part = partition_size(info.numel, len(self._model))
            for rank, file in enumerate(self._model):
                fragment = file.content["frozen_param_fragments"][name]
                yield rank * part, min(part, max(info.numel - rank * part, 0)), partial(file.read, fragment)
            return
        for p in self._layout.pieces(name):
            group = self._groups[p.rank][p.group][p.start : p.start + p.numel]
            yield p.target, p.numel, partial(self._optim[p.rank].read, group)


def _info(name: str, shape: Any, dtype: str) -> TensorInfo:
    return TensorInfo(name=name, shape=tuple(shape), dtype=dtype)


def _check_model_states(file: TorchFile, first: TorchFile, world_size: int) -> None:
    """Raise unless a rank's model states are of stage 3 and belong to rank 0's."""
    content = file.content
    if not isinstance(content, dict) or not isinstance(content.get("param_shapes"), list) or "module" not in content:
        raise CheckpointError(f"{file.path} is not a model states file of ZeRO stage 3 (no list 'param_shapes')")
    written = content.get("dp_world_size", world_size)
    if written != world_size:
        raise CheckpointError(f"{file.path} was written by {written} ranks; the directory holds files of {world_size}")
    if content.get("mp_world_size", 1) != 1:
        raise CheckpointError(f"{file.path}: checkpoints split by model parallelism are not supported")
    for key in ("global_steps", "param_shapes", "frozen_param_shapes"):
        if content.get(key) != first.content.get(key):
            raise CheckpointError(f"{file.path}: '{key}' differs from {first.path.name}; the files are of two saves")


def _flat_groups(file: TorchFile, world_size: int) -> list[torch.Tensor]:
    """Return a rank's flat fp32 groups.

    Raises:
        CheckpointError: The file is not of stage 3 or of another number of ranks.
    """
    states = file.content.get("optimizer_state_dict") if isinstance(file.content, dict) else None
    if not isinstance(states, dict) or "zero_stage" not in states:
        raise CheckpointError(f"{file.path} is not an optimizer states file of DeepSpeed ZeRO")
    if int(states["zero_stage"]) != 3:
        raise CheckpointError(f"{file.path} is of ZeRO stage {int(states['zero_stage'])}; only stage 3 is supported")
    count = states.get("partition_count", world_size)
    count = max(count) if isinstance(count, list) else count
    if count != world_size:
        raise CheckpointError(f"{file.path} was written by {count} ranks; the directory holds files of {world_size}")
    groups = states.get("fp32_flat_groups")
    if not isinstance(groups, list) or not all(
        isinstance(g, torch.Tensor) and g.dtype == torch.float32 and g.is_contiguous() for g in groups
    ):
        raise CheckpointError(
            f"{file.path} holds no fp32_flat_groups (offloaded to NVMe?): weights are not in this file"
        )
    return groups
