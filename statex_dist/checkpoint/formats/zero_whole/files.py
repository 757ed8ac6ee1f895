"""The files of ZeRO stages 0 to 2: their names, and the checks that they belong together."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from statex_dist.checkpoint.formats.torch_archive.pickle import Remembered, TensorRef
from statex_dist.checkpoint.formats.torch_archive.zip import TorchArchive, open_archive
from statex_dist.checkpoint.formats.zero3.layout import WHOLE_MODEL_NAME as MODEL_NAME
from statex_dist.checkpoint.formats.zero3.rank import check_name
from statex_dist.errors import CheckpointError

_MODEL_FILE = re.compile(r"mp_rank_(\d+)_model_states\.pt$")
_OPTIM_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt$")
_CLIENT_FILE = re.compile(r"rank_(\d+)_client_states\.pt$")

Partitions = list[TensorRef]
"""A rank's part of each parameter group."""


def optim_files(directory: Path) -> list[Path]:
    """Return the optimizer files of every rank, by rank; none in stage 0.

    Raises:
        CheckpointError: A rank lacks its file, a rank has two, or the checkpoint is split by model parallelism.
    """
    found: dict[int, Path] = {}
    for path in sorted(directory.iterdir()):
        model, optim = _MODEL_FILE.match(path.name), _OPTIM_FILE.match(path.name)
        if (model and int(model[1])) or (optim and int(optim[2])):
            raise CheckpointError(f"{path}: checkpoints split by model parallelism are not supported")
        if optim is None:
            continue
        if other := found.get(int(optim[1])):
            raise CheckpointError(f"{directory} holds two files of rank {optim[1]}: {other.name} and {path.name}")
        found[int(optim[1])] = path
    if missing := [rank for rank in range(max(found, default=-1) + 1) if rank not in found]:
        raise CheckpointError(
            f"{directory}: the optim states of rank {', '.join(map(str, missing))} are missing "
            f"(*zero_pp_rank_{missing[0]}_mp_rank_00_optim_states.pt)"
        )
    return [found[rank] for rank in sorted(found)]


def client_files(directory: Path) -> list[Path]:
    """Return the files with the ranks' client states, which our runs have."""
    return sorted(path for path in directory.iterdir() if _CLIENT_FILE.match(path.name))


def open_model(path: Path) -> TorchArchive:
    """Open the file with the whole model.

    Raises:
        CheckpointError: It is damaged, or no such file.
    """
    archive = open_archive(path)
    content = archive.content
    if not isinstance(content, dict) or not isinstance(content.get("module"), dict) or "global_steps" not in content:
        raise CheckpointError(f"{path} is not a model states file of DeepSpeed (no 'module' with 'global_steps')")
    if content.get("mp_world_size", 1) != 1:
        raise CheckpointError(f"{path}: checkpoints split by model parallelism are not supported")
    return archive


def stage_in(file: TorchArchive) -> int:
    """Return the stage that an optimizer file says; -1 where it says nothing that could be one."""
    states = file.content.get("optimizer_state_dict") if isinstance(file.content, dict) else None
    # DeepSpeed's optimizer of stage 1 in bf16 does not say its stage.
    stage = states.get("zero_stage", 1) if isinstance(states, dict) else -1
    stage = stage.args[0] if isinstance(stage, Remembered) and len(stage.args) == 1 else stage
    return stage if isinstance(stage, int) else -1


def optim_states(file: TorchArchive, world_size: int) -> Mapping[str, Any]:
    """Return a rank's optimizer states, after checking that they are of stage 1 or 2 and of ``world_size`` ranks.

    Raises:
        CheckpointError: They are not, or the file is another rank's, or holds no weights.
    """
    states = file.content.get("optimizer_state_dict") if isinstance(file.content, dict) else None
    if not isinstance(states, dict) or not isinstance(states.get("single_partition_of_fp32_groups"), list):
        raise CheckpointError(f"{file.path} is not an optimizer states file of ZeRO stage 1 or 2")
    check_name(file)
    if stage_in(file) not in (1, 2):
        raise CheckpointError(f"{file.path} is of ZeRO stage {stage_in(file)}, beside {MODEL_NAME}")
    count = states.get("partition_count", world_size)
    counts = count if isinstance(count, list) else [count]
    if any(count != world_size for count in counts):
        raise CheckpointError(
            f"{file.path} was written by {counts[0]} ranks; the directory holds files of {world_size}"
        )
    for group in states["single_partition_of_fp32_groups"]:
        if not isinstance(group, TensorRef) or group.dtype != "F32" or not group.is_contiguous:
            raise CheckpointError(f"{file.path}: its weights are not fp32; only fp32 is supported")
    return states


def base_states(states: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """Return the states of the optimizer that ZeRO is wrapped around.

    Raises:
        CheckpointError: They are in the form of ``elastic_checkpoint``.
    """
    base = states.get("base_optimizer_state") or {}
    if not isinstance(base, dict):
        raise CheckpointError(f"{path}: optimizer states saved with elastic_checkpoint are not supported")
    return base
