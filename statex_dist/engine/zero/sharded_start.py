"""A start of ZeRO-3 in which no process ever holds the whole model.

The model is laid out on ``meta``. Each rank makes its partition of every parameter from the elements that it owns, and
nothing is sent between ranks. ``deepspeed.zero.Init`` around the constructor is no way to this: it makes each parameter
whole and broadcasts it, and gives fp32 buffers the parameters' dtype.

What DeepSpeed 0.19 keeps of a partitioned parameter (``ds_tensor`` and its fields) is set here as its
``_partition_param`` does (deepspeed/runtime/zero/partition_parameters.py).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from deepspeed.runtime.zero.partition_parameters import free_param
from torch import nn

from statex_dist.engine.base import ParameterValues

logger = logging.getLogger(__name__)


class Unset:
    """NaN for every element: the values of a start that resumes, whose checkpoint sets all of them."""

    def read(self, name: str, start: int, stop: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield one piece of NaN, which takes no memory."""
        if start < stop:
            yield start, torch.full((1,), torch.nan).expand(stop - start)

    def verify(self, rank: int, world_size: int) -> None:
        """Compare nothing: there are no files."""


def partition_model(model: nn.Module, values: ParameterValues, settings: dict[str, Any], device: torch.device) -> None:
    """Replace a model's parameters on ``meta`` by partitioned ones; a parameter of several modules stays one.

    Args:
        model: Its parameters are on ``meta`` with their final dtype, its buffers are not. Which parameters are trained
            has been decided.
        values: The parameters, and the buffers that its ``state_dict`` has, by name.
        settings: DeepSpeed's configuration.
        device: Where the model is trained.

    Raises:
        StateXError: Values cannot be read.
    """
    zero: Any = deepspeed.zero.Init(config_dict_or_path=settings)
    with zero:
        # Entered once for what stays behind: a linear layer that does not keep its gathered weight for the backward
        # pass. DeepSpeed installs it only where it partitions the model itself.
        pass
    stored = model.state_dict(keep_vars=True).keys()
    made: dict[int, torch.Tensor] = {}
    for prefix, module in model.named_modules():
        path = f"{prefix}." if prefix else ""
        for leaf, old in list(module.named_parameters(recurse=False)):
            if id(old) not in made:
                made[id(old)] = _partitioned(f"{path}{leaf}", old, zero, values, device)
            setattr(module, leaf, made[id(old)])
        for leaf, buffer in list(module.named_buffers(recurse=False)):
            if id(buffer) not in made:
                if f"{path}{leaf}" in stored:
                    _fill(buffer.view(-1), values.read(f"{path}{leaf}", 0, buffer.numel()), 0)
                made[id(buffer)] = buffer.to(device)
            module._buffers[leaf] = made[id(buffer)]
    logger.debug("%d parameters and buffers made from their partitions", len(made))


def _partitioned(
    name: str, old: nn.Parameter, zero: Any, values: ParameterValues, device: torch.device
) -> nn.Parameter:
    """Return a parameter of which this rank holds its partition, zero where that is longer than the parameter."""
    # DeepSpeed asks for shape, dtype and device of a whole parameter: one element, seen as all of them.
    whole = torch.empty(1, dtype=old.dtype, device=device).expand(old.shape)
    parameter: Any = nn.Parameter(whole, requires_grad=old.requires_grad)
    zero._convert_to_deepspeed_param(parameter)
    rank, count = parameter.ds_zero_partition_rank, parameter.ds_zero_partition_world_size
    size = -(-parameter.ds_numel // count)
    on_host = zero.remote_device == OffloadDeviceEnum.cpu and not parameter.ds_persist
    held: Any = torch.zeros(size, dtype=old.dtype, device="cpu" if on_host else device)
    if on_host and zero.pin_memory:
        held = deepspeed.accelerator.get_accelerator().pin_memory(held)
    start, stop = min(rank * size, parameter.ds_numel), min((rank + 1) * size, parameter.ds_numel)
    _fill(held, values.read(name, start, stop), start)
    held.ds_numel, held.status, held.final_location = size, PartitionedParamStatus.AVAILABLE, None
    parameter.ds_tensor, parameter.ds_numel_aligned = held, size * count
    # Not partition(): with zero_hpz_partition_size it would cut a second partition out of the values that are not here.
    free_param(parameter)
    return parameter


@torch.no_grad()
def _fill(target: torch.Tensor, pieces: Iterator[tuple[int, torch.Tensor]], start: int) -> None:
    """Copy pieces of a flattened tensor into ``target``, which begins at its element ``start``."""
    for place, piece in pieces:
        target[place - start : place - start + len(piece)].copy_(piece)
