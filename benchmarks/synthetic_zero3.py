"""ZeRO-3 checkpoints as DeepSpeed 0.19 writes them, of any size, without training: for benchmarks and fast tests.

Files, names, keys, sub-groups and padding are those of DeepSpeed; the values are given or random. Tests also check our
readers against real checkpoints.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

PADDING = 1e30
"""Value of the elements that DeepSpeed leaves uninitialised; no reader may use it."""


def write_zero3(
    tag: Path,
    tensors: Mapping[str, torch.Tensor],
    world_size: int,
    *,
    moments: bool = True,
    sub_group_size: int = 10**9,
) -> None:
    """Write tensors as the files of one ZeRO-3 tag of a bf16 run.

    Args:
        tag: Directory to make.
        tensors: The logical parameters, fp32.
        world_size: Ranks.
        moments: Whether to write Adam's states too, as a real checkpoint does: half of the weights and their squares.
        sub_group_size: Elements of a rank after which a new flat group begins.
    """

    def values(names: Sequence[str], rank: int, state: int) -> torch.Tensor:
        flat = torch.cat([_part(tensors[name], rank, world_size) for name in names])
        return (flat, flat * 0.5, flat * flat)[state]

    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    _write(tag, shapes, world_size, values, moments=moments, sub_group_size=sub_group_size)


def write_random_zero3(tag: Path, shapes: Mapping[str, tuple[int, ...]], world_size: int) -> None:
    """Write a checkpoint of random values, with at most the memory of one rank's files."""
    rng = np.random.default_rng(0)
    block = (rng.standard_normal(1 << 22, dtype=np.float32) * 0.02).astype(np.float32)

    def values(names: Sequence[str], rank: int, state: int) -> torch.Tensor:
        size = sum(-(-math.prod(shapes[name]) // world_size) for name in names)
        flat = np.resize(np.roll(block, rank * 7919 + state), size)
        return torch.from_numpy(np.abs(flat) if state == 2 else flat)

    _write(tag, shapes, world_size, values, moments=True, sub_group_size=10**9)


def _write(
    tag: Path,
    shapes: Mapping[str, tuple[int, ...]],
    world_size: int,
    values: Callable[[Sequence[str], int, int], torch.Tensor],
    *,
    moments: bool,
    sub_group_size: int,
) -> None:
    tag.mkdir(parents=True)
    groups: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        if filled >= sub_group_size:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += -(-math.prod(shape) // world_size)
    settings = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, "sub_group_size": sub_group_size},
    }
    for rank in range(world_size):
        flats = [[values(names, rank, state) for names in groups] for state in range(3 if moments else 1)]
        states = [
            {"step": torch.tensor(1.0), "exp_avg": flats[1][i], "exp_avg_sq": flats[2][i]} if moments else {}
            for i in range(len(groups))
        ]
        optim = {
            "zero_stage": 3,
            "loss_scaler": None,
            "dynamic_loss_scale": False,
            "overflow": False,
            "partition_count": world_size,
            "optimizer_state_dict": {
                "state": dict(enumerate(states)) if moments else {},
                "param_groups": [{**settings, "params": list(range(len(groups)))}],
            },
            "fp32_flat_groups": flats[0],
        }
        model = {
            "module": OrderedDict((name, torch.empty(0, dtype=torch.bfloat16)) for name in shapes),
            "buffer_names": [],
            "optimizer": None,
            "param_shapes": [OrderedDict((name, torch.Size(shapes[name])) for name in names) for names in groups],
            "frozen_param_shapes": OrderedDict(),
            "frozen_param_fragments": OrderedDict(),
            "shared_params": {},
            "lr_scheduler": None,
            "skipped_steps": 0,
            "global_steps": 1,
            "global_samples": world_size,
            "dp_world_size": world_size,
            "mp_world_size": 1,
            "ds_config": config,
            "ds_version": "0.19.8",
        }
        torch.save(
            {"optimizer_state_dict": optim, "ds_config": config, "ds_version": "0.19.8"},
            tag / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
        )
        torch.save(model, tag / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
    (tag.parent / "latest").write_text(tag.name)


def _part(tensor: torch.Tensor, rank: int, world_size: int) -> torch.Tensor:
    """Return a rank's part of a tensor, padded."""
    part = -(-tensor.numel() // world_size)
    piece = tensor.reshape(-1)[rank * part : (rank + 1) * part]
    return torch.cat([piece, torch.full((part - piece.numel(),), PADDING)])
