"""Restoring the states of a ZeRO-3 engine from what this rank has read, without DeepSpeed's ``load_checkpoint``.

DeepSpeed's own asks the file system for the files of all ranks, on all ranks, reads a rank's files again and runs their
pickles. The steps here are those of DeepSpeed 0.19.8 (``engine.load_checkpoint``, ``stage3._rigid_load_state_dict``) on
values that are in memory; a test compares the two.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from statex_dist.engine.zero.reading import Cut, Runs, SavedStates

_NOT_CLIENT = (
    *("module", "skipped_steps", "global_steps", "dp_world_size", "mp_world_size", "data_sampler", "random_ltd"),
    *("lr_scheduler", "optimizer"),
)
"""Keys of the model states that DeepSpeed does not return as the client's."""


def cut_of(engine: Any, *, rank: int, world_size: int) -> Cut:
    """Return how a DeepSpeed engine of stage 3 has cut its model."""
    zero = engine.optimizer
    shapes = [{name: tuple(shape) for name, shape in g.items()} for g in engine._get_zero_param_shapes()]
    owners = [zero.sub_group_to_group_id[index] for index in range(len(shapes))]
    return Cut(rank=rank, world_size=world_size, sub_groups=shapes, owners=owners)


def restore(engine: Any, saved: SavedStates) -> dict[str, Any]:
    """Set every parameter, buffer, optimizer state and counter of a DeepSpeed engine; all ranks call it together.

    Args:
        engine: A DeepSpeed engine of stage 3 with the parameter groups of the checkpoint.
        saved: This rank's part.

    Returns:
        The client state.
    """
    zero, model = engine.optimizer, saved.model
    zero.checkpoint_event_prologue()  # all parameters are partitioned
    engine.load_module_state_dict(model)
    engine.lr_scheduler.load_state_dict(model["lr_scheduler"])
    engine.global_steps, engine.skipped_steps = model["global_steps"], model["skipped_steps"]
    engine.global_samples = model.get("global_samples", engine.global_steps * engine.train_batch_size())
    engine.loaded_checkpoint_mp_world_size = model["mp_world_size"]
    engine.loaded_checkpoint_dp_world_size = engine.seq_dp_world_size
    for flat, states in zip(zero.fp32_partitioned_groups_flat, saved.states, strict=True):
        _restore_states(zero.optimizer, flat, states)
    kept = {"loss_scaler": zero.loss_scaler, "dynamic_loss_scale": zero.dynamic_loss_scale, "overflow": False}
    zero._rigid_load_state_dict({**kept, "fp32_flat_groups": saved.flat}, load_optimizer_states=False)
    if zero.persistent_parameters:
        zero.persistent_parameters[0].partition(zero.persistent_parameters)
    zero.checkpoint_event_epilogue()  # persistent parameters are gathered again
    return {key: value for key, value in model.items() if key not in _NOT_CLIENT}


def _restore_states(optimizer: torch.optim.Optimizer, flat: torch.Tensor, saved: Mapping[str, Any]) -> None:
    """Replace what an optimizer keeps of a flat group; tensors that it has already are filled, not replaced."""
    held = optimizer.state.pop(flat, {})
    if not saved:
        return
    for key, value in saved.items():
        old = held.get(key)
        if isinstance(value, torch.Tensor) and isinstance(old, torch.Tensor) and old.shape == value.shape:
            value = old.copy_(value)
        elif isinstance(value, torch.Tensor):
            value = value.to(flat.device if value.dim() else value.device, copy=True)
        optimizer.state[flat][key] = value


def exchange(values: list[dict[str, Runs]], device: torch.device) -> list[dict[str, Runs]]:
    """Send ``values[r]`` to rank ``r``, and return what the ranks sent to this one, by rank."""
    data = [torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8) for value in values]
    sizes = torch.tensor([len(part) for part in data], device=device)
    incoming = torch.empty_like(sizes)
    dist.all_to_all_single(incoming, sizes)
    counts = incoming.tolist()
    received = torch.empty(sum(counts), dtype=torch.uint8, device=device)
    dist.all_to_all_single(received, torch.cat(data).to(device), counts, sizes.tolist())
    return [pickle.loads(part.numpy().tobytes()) for part in received.cpu().split(counts)]
