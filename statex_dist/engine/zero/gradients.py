"""The accumulated gradient of a step, as DeepSpeed holds it in each of its stages."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer


class Gradients(ABC):
    """This rank's part of the gradient between the last backward pass and the step.

    Args:
        optimizer: The optimizer that DeepSpeed wrapped around torch's.
    """

    def __init__(self, optimizer: Any):
        self.optimizer = optimizer

    @abstractmethod
    def parts(self) -> Iterator[tuple[int, Iterable[torch.Tensor]]]:
        """Yield tensors with the index of their parameter group; every element is on one rank alone."""

    def norms(self) -> Iterator[tuple[int, Iterable[torch.Tensor]]]:
        """Yield norms of tensors, with the index of their parameter group."""
        for group, tensors in self.parts():
            if held := list(tensors):
                yield group, torch._foreach_norm(held, dtype=torch.float32)  # in bf16 a norm has 8 bits

    @abstractmethod
    def spoil(self) -> None:
        """Make DeepSpeed drop this step: it does so, and only so, where the gradient is not finite."""


class Stage3Gradients(Gradients):
    """Of stage 3: by sub-group; with an offloaded optimizer only the norms are known."""

    def parts(self) -> Iterator[tuple[int, Iterable[torch.Tensor]]]:
        """Yield each sub-group's averaged gradients."""
        for index in range(len(self.optimizer.fp16_groups)):
            yield self.optimizer.sub_group_to_group_id[index], self.optimizer.averaged_gradients[index]

    def norms(self) -> Iterator[tuple[int, Iterable[torch.Tensor]]]:
        """Yield norms, as DeepSpeed has computed them where it moved the gradients off the GPU."""
        if not self.optimizer.offload_optimizer:
            yield from super().norms()
            return
        known = self.optimizer.norm_for_param_grads
        for index, parameters in enumerate(self.optimizer.fp16_groups):
            norms = [known.get(self.optimizer.get_param_id(parameter)) for parameter in parameters]
            yield self.optimizer.sub_group_to_group_id[index], [norm for norm in norms if norm is not None]

    def spoil(self) -> None:
        """Put NaN where DeepSpeed looks: into the norms of an offloaded optimizer, else into a gradient."""
        if self.optimizer.offload_optimizer:
            for norm in self.optimizer.norm_for_param_grads.values():
                norm.fill_(torch.nan)
        else:
            for gradients in self.optimizer.averaged_gradients.values():
                gradients[0].fill_(torch.nan)


class Stage12Gradients(Gradients):
    """Of stages 1 and 2: this rank's partition of each group, with zeros as padding."""

    def parts(self) -> Iterator[tuple[int, Iterable[torch.Tensor]]]:
        """Yield each group's averaged gradients."""
        yield from self.optimizer.averaged_gradients.items()

    def spoil(self) -> None:
        """Put NaN into one gradient of each group."""
        for gradients in self.optimizer.averaged_gradients.values():
            gradients[0].fill_(torch.nan)


class Bf16Gradients(Gradients):
    """Of stage 1 in bf16 with gradients summed in fp32, for which DeepSpeed has an optimizer of its own."""

    def parts(self) -> Iterator[tuple[int, Iterable[torch.Tensor]]]:
        """Yield this rank's partition of each group."""
        for index, partition in enumerate(self.optimizer.fp32_groups_gradient_flat_partition):
            yield index, [partition]

    def spoil(self) -> None:
        """Put NaN into every partition."""
        for partition in self.optimizer.fp32_groups_gradient_flat_partition:
            partition.fill_(torch.nan)


class WholeGradients(Gradients):
    """Of stage 0: whole on every rank, so that rank 0's count and the others' do not."""

    def parts(self) -> Iterator[tuple[int, Iterable[torch.Tensor]]]:
        """Yield every gradient on rank 0, and nothing on the others."""
        if dist.get_rank() == 0:
            for index, group in enumerate(self.optimizer.param_groups):
                yield index, _gradients(group["params"])

    def spoil(self) -> None:
        """Put NaN into every gradient."""
        for group in self.optimizer.param_groups:
            for gradient in _gradients(group["params"]):
                gradient.fill_(torch.nan)


class CheckedOptimizer:
    """torch's optimizer with what DeepSpeed's have: a step whose gradient is not finite is dropped.

    DeepSpeed wraps no optimizer of its own around it in stage 0. All ranks hold the same gradient, and decide alike.

    Args:
        optimizer: The optimizer.

    Attributes:
        overflow: Whether the last step was dropped; DeepSpeed counts it then, and leaves the schedule where it was.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        self._optimizer = optimizer
        self.overflow = False

    def __getattr__(self, name: str) -> Any:
        """Return what torch's optimizer has."""
        return getattr(self._optimizer, name)

    def step(self) -> None:
        """Update the parameters, or note that the gradient is not finite."""
        gradients = [g for group in self._optimizer.param_groups for g in _gradients(group["params"])]
        self.overflow = not bool(torch.stack(list(torch._foreach_norm(gradients))).isfinite().all())
        if not self.overflow:
            self._optimizer.step()


def _gradients(parameters: Iterable[torch.nn.Parameter]) -> list[torch.Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


_KINDS: dict[type, type[Gradients]] = {
    DeepSpeedZeroOptimizer_Stage3: Stage3Gradients,
    DeepSpeedZeroOptimizer: Stage12Gradients,
    BF16_Optimizer: Bf16Gradients,
    CheckedOptimizer: WholeGradients,
}


def gradients_of(optimizer: Any) -> Gradients:
    """Return how the gradient lies in an optimizer of DeepSpeed."""
    return next(kind for cls, kind in _KINDS.items() if isinstance(optimizer, cls))(optimizer)
