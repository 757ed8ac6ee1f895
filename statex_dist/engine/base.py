"""The seam between the training loop and whatever computes: forward, backward, step, and what a checkpoint holds."""

from __future__ import annotations

import math
import resource
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from statex_dist.batch import PackedBatch
from statex_dist.config import check_finite
from statex_dist.distributed.context_group import ContextGroup
from statex_dist.engine.segment_states import CarriedStates
from statex_dist.engine.state_passing import StatePassing
from statex_dist.engine.timing import PhaseTimer
from statex_dist.errors import CheckpointError, ConfigError
from statex_dist.state.scan_memory import MAX_STATE_BYTES

Place = Literal["none", "cpu", "nvme"]


@dataclass(kw_only=True)
class EngineConfig:
    """How the model is trained.

    Attributes:
        name: ``zero3`` (DeepSpeed, any number of ranks) or ``plain`` (PyTorch, one process).
        precision: Of parameters and activations; optimizer states and master weights are fp32 either way.
        activation_checkpointing: Layers that are recomputed in the backward pass: ``none``, every ``block``, or only
            the ``expanded`` ones, whose states are the largest.
        loss_chunk_tokens: Tokens whose logits are held at once, nothing being computed twice for it; 0 holds those of
            the whole sequence.
        segment_tokens: A packed sequence is run in segments of so many tokens, each with its own backward pass; states
            go on from one to the next, gradients do not (truncated BPTT). 0 runs it whole.
        max_state_bytes: Bound of the chunk states that the GPU scan of an expanded GLA layer holds at once; the
            backward pass computes them again, segment by segment.
        param_persistence_threshold: ZeRO-3 keeps parameters with fewer elements whole on every rank.
        sub_group_size: Elements that ZeRO-3's optimizer updates at once, per rank.
        offload_optimizer: Where ZeRO-3 keeps optimizer states and master weights instead of the GPU: ``none`` or
            ``cpu``.
        offload_parameters: The same of the parameters, which may go to ``nvme`` too.
        nvme_path: Directory on a local disk, for ``nvme``.
        timeout_minutes: After which a collective gives up on a dead peer.
    """

    name: Literal["zero3", "plain"] = "zero3"
    precision: Literal["bf16", "fp32"] = "bf16"
    activation_checkpointing: Literal["none", "block", "expanded"] = "none"
    loss_chunk_tokens: int = 8192
    segment_tokens: int = 0
    max_state_bytes: int = MAX_STATE_BYTES
    param_persistence_threshold: int = 100_000
    sub_group_size: int = 1_000_000_000
    offload_optimizer: Place = "none"
    offload_parameters: Place = "none"
    nvme_path: str | None = None
    timeout_minutes: float = 30.0

    def __post_init__(self) -> None:
        check_finite(self, "engine")
        if self.name == "plain" and self.precision != "fp32":
            raise ConfigError(f"engine.name plain trains in fp32; set engine.precision to fp32, not {self.precision}")
        for name in ("max_state_bytes", "sub_group_size", "timeout_minutes"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"engine.{name} must be above 0, not {getattr(self, name)}")
        for name in ("loss_chunk_tokens", "segment_tokens", "param_persistence_threshold"):
            if getattr(self, name) < 0:
                raise ConfigError(f"engine.{name} must be 0 or more, not {getattr(self, name)}")
        places = {self.offload_optimizer, self.offload_parameters}
        if self.name == "plain" and places != {"none"}:
            raise ConfigError("engine.offload_optimizer and engine.offload_parameters need engine.name zero3")
        if self.offload_optimizer == "nvme":
            raise ConfigError(
                "engine.offload_optimizer nvme is refused: DeepSpeed 0.19 does not restore such a run from its "
                "checkpoint (it goes on with the wrong weights); use cpu. engine.offload_parameters may be nvme"
            )
        if "nvme" in places and self.nvme_path is None:
            raise ConfigError("engine: offloading to nvme needs engine.nvme_path, a directory on a local disk")
        if self.nvme_path is not None and "nvme" not in places:
            raise ConfigError("engine.nvme_path is given, but nothing is offloaded to nvme")


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What an optimizer step reports: whether parameters were updated, and the learning rate that was used."""

    updated: bool
    lr: float


class TrainEngine(ABC):
    """Computes training steps on this rank's share of the batch.

    Attributes:
        kind: Layout of its checkpoints.
        rank: This process among all.
        world_size: All processes.
        data_parallel_size: Groups of ranks that get packs of their own.
        data_parallel_rank: This process's group.
        timer: Measures ``forward`` and ``backward``.
        carried: States between packs.
        num_targets: Target tokens of the last global batch.
        saved_rates: Learning rate of each group that the next step of the loaded checkpoint would have had; empty
            without one.
    """

    kind: str
    rank: int
    world_size: int
    device: torch.device
    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LambdaLR
    carried: CarriedStates
    timer: PhaseTimer
    num_targets: int
    saved_rates: list[float]

    def __init__(
        self,
        *,
        rank: int,
        world_size: int,
        device: torch.device,
        segment_tokens: int,
        context: ContextGroup | None,
        passing: StatePassing | None,
    ):
        self.rank, self.world_size, self.device = rank, world_size, device
        self.segment_tokens, self.context = segment_tokens, context
        self.carried = CarriedStates(context, passing)
        self.timer = PhaseTimer(device)
        self.num_targets = 0
        self.saved_rates = []
        self._losses: list[tuple[int, torch.Tensor]] = []

    @property
    def data_parallel_size(self) -> int:
        """Groups of ranks that get packs of their own."""
        return self.world_size // (self.context.size if self.context else 1)

    @property
    def data_parallel_rank(self) -> int:
        """This process's group among them."""
        return self.rank // (self.context.size if self.context else 1)

    @property
    def counts(self) -> bool:
        """Whether this rank counts what its packs hold: every rank of a context group has the same packs."""
        return self.context is None or self.context.rank == 0

    def forward_backward(self, batches: Sequence[PackedBatch], *, observe_states: bool = False) -> float:
        """Accumulate the gradient of one global batch.

        The loss is weighted by target token over *all* ranks, so that unevenly filled packs do not bias the gradient.

        Args:
            batches: This data-parallel rank's packs, as many on every one.
            observe_states: Whether :meth:`state_norms` is to be asked for afterwards.

        Returns:
            Mean cross entropy per target token of the global batch, in nats; NaN where it has no target. Then the
            gradient is zero, and carried states are still computed.
        """
        targets = sum(batch.num_target_tokens for batch in batches) if self.counts else 0
        self.num_targets = round(self.sum([float(targets)])[0])
        total = float(self.num_targets)
        pieces = [
            (self.data_parallel_rank * len(batches) + index, piece)
            for index, batch in enumerate(batches)
            for piece in batch.segments(self.segment_tokens)
        ]
        losses = []
        for index, (lane, piece) in enumerate(pieces):
            last = index + 1 == len(pieces)
            with self.timer.phase("forward"):
                loss_sum = self.carried.forward_loss(
                    self.model, piece, lane, self.device, observe=observe_states and last
                )
            with self.timer.phase("backward"):
                self._backward(loss_sum, total or 1.0, last=last)
            losses.append(loss_sum.detach())
        self._losses = [
            (lane - self.data_parallel_rank * len(batches), loss)
            for (lane, _), loss in zip(pieces, losses, strict=True)
        ]
        loss = self.sum([float(torch.stack(losses).double().sum())])[0]
        return loss / total if total else math.nan

    def bad_pack(self) -> int | None:
        """Return the first of this rank's last packs whose loss is not finite, or None."""
        return next((index for index, loss in self._losses if not math.isfinite(float(loss))), None)

    def state_norms(self) -> dict[str, float]:
        """Return the root mean square of each layer's state after the last document of this rank's last pack.

        By layer; empty where it was not observed, or is not known (padding behind it, in a pack over several ranks).
        """
        return {str(layer): float(square) ** 0.5 for layer, square in enumerate(self.carried.observed or ())}

    def peak_memory(self) -> int:
        """Return the most bytes this process held: allocated on the GPU, or resident where there is none."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    @abstractmethod
    def _backward(self, loss_sum: torch.Tensor, total: float, *, last: bool) -> None:
        """Add the gradient of ``loss_sum / total`` over all ranks; ``last`` completes the global batch."""

    @abstractmethod
    def grad_norms(self) -> dict[str, float]:
        """Return the global norm of the accumulated gradient by parameter group, before clipping."""

    @abstractmethod
    def step(self, *, skip: bool = False) -> StepResult:
        """Clip, update the parameters, advance the schedule and clear the gradients; ``skip`` updates nothing."""

    @abstractmethod
    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the sums of ``values`` over all ranks."""

    def any_rank(self, *flags: bool) -> list[bool]:
        """Return for each flag whether it is true on any rank."""
        return [total > 0 for total in self.sum([float(flag) for flag in flags])]

    @abstractmethod
    def barrier(self) -> None:
        """Wait for all ranks."""

    @abstractmethod
    def gather(self, value: Any) -> list[Any]:
        """Return every rank's ``value``, by rank."""

    @abstractmethod
    def broadcast(self, value: Any) -> Any:
        """Return rank 0's ``value``."""

    @abstractmethod
    def close(self) -> None:
        """Release what the engine holds of the other ranks."""

    @abstractmethod
    def capture(self, directory: Path, client_state: Mapping[str, Any]) -> list[tuple[Path, Any]]:
        """Return what this rank's files of a checkpoint in ``directory`` are to hold; tensors are the live ones.

        All ranks call it together.
        """

    @abstractmethod
    def load(self, directory: Path) -> dict[str, Any]:
        """Restore from the checkpoint ``directory`` and return the client state.

        Learning rate, betas and weight decay stay those of this start; :attr:`saved_rates` holds the old rates.
        """


@contextmanager
def keep_hyperparameters(
    optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LambdaLR
) -> Iterator[list[float]]:
    """Restore states inside, but not the settings that come with them: those of the configuration stay in force.

    Yields:
        A list that holds, afterwards, the learning rate that each group's next step would have had.
    """
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    base_lrs = list(schedule.base_lrs)
    saved_rates: list[float] = []
    yield saved_rates
    saved_rates += map(float, schedule.get_last_lr())
    schedule.base_lrs = base_lrs
    for group, kept, base_lr, factor in zip(
        optimizer.param_groups, settings, base_lrs, schedule.lr_lambdas, strict=True
    ):
        group.update(kept, lr=base_lr * factor(schedule.last_epoch))


def base_lr(optimizer: torch.optim.Optimizer) -> float:
    """Return the learning rate of this step for a parameter without a factor of its own."""
    first = optimizer.param_groups[0]
    return first["lr"] / first.get("lr_factor", 1.0)


def check_groups(saved: Sequence[Any], ours: Sequence[Any], where: Path) -> None:
    """Raise if a checkpoint's parameter groups are not those of this run.

    Raises:
        CheckpointError: They differ: an optimizer's states could not be told apart.
    """
    if list(saved) != list(ours):
        raise CheckpointError(
            f"{where} has its parameters in other groups; optimizer.train, optimizer.freeze, the roles in "
            "optimizer.lr_factors and engine.sub_group_size must stay as they were when the run began"
        )


def group_name(group: Mapping[str, Any], index: int) -> str:
    """Return the name of an optimizer's parameter group, or its number where it has none."""
    return str(group.get("name", index))
