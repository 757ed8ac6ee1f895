"""The interface between the training loop and an engine: forward, backward, step, and a checkpoint's content."""

from __future__ import annotations

import math
import resource
import sys
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from statex_dist.batch import PackedBatch, pack_range
from statex_dist.checkpoint.manifest import Manifest
from statex_dist.distributed.context_group import ContextGroup
from statex_dist.engine.segment_states import CarriedStates, StatePassing
from statex_dist.engine.snapshot import random_state, set_random_state
from statex_dist.errors import CheckpointError

DUMMY_TOKENS = 64
"""Tokens that a dummy pack or a segment of one is run with, on each rank of a context group."""

_NO_LANE = -1


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """Result of an optimizer step: whether parameters were updated, and the learning rate that was used."""

    updated: bool
    lr: float


class ParameterValues(Protocol):
    """Where an engine that partitions a model on ``meta`` gets the values of parameters and buffers."""

    def read(self, name: str, start: int, stop: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield the elements ``start .. stop`` of a flattened tensor as ``(first element, values)``, in order."""

    def verify(self, rank: int, world_size: int) -> None:
        """Compare this rank's share of the files with their digests; raise if one is damaged."""


class PhaseTimer:
    """Adds up the time of named phases.

    On a GPU work is queued, so each phase is marked by events in the queue and read when the step is over; the host
    never waits for a measurement.

    Args:
        device: Where the work is done.
    """

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside as ``name``."""
        if self._cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((name, begin, end))
        else:
            start = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """Return seconds by phase since the last call."""
        for name, begin, end in self._events:
            end.synchronize()
            self._seconds[name] += begin.elapsed_time(end) / 1000
        self._events.clear()
        seconds, self._seconds = dict(self._seconds), defaultdict(float)
        return seconds


class TrainEngine(ABC):
    """Computes training steps on this rank's share of the batch.

    Attributes:
        kind: Layout of its checkpoints.
        in_folders: Whether it finds the files of many ranks in folders of a checkpoint.
        rank: This process among all.
        world_size: All processes.
        data_parallel_size: Groups of ranks that get packs of their own.
        data_parallel_rank: This process's group.
        timer: Measures ``forward`` and ``backward``.
        carried: States between packs.
        num_targets: Target tokens of the last global batch.
        num_packs: Packs of the last global batch, without dummies.
        router_loss: Load-balancing loss of the last global batch's experts with its factor, or None.
        waited: Seconds in :meth:`sum` and :meth:`gather_row` since :meth:`take_waited`.
        saved_rates: Learning rate of each group that the next step of the loaded checkpoint would have had; empty
            without one.
    """

    kind: str
    in_folders = False
    rank: int
    world_size: int
    device: torch.device
    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LambdaLR
    carried: CarriedStates
    timer: PhaseTimer
    num_targets: int
    num_packs: int
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
        self.num_targets = self.num_packs = 0
        self.router_loss: float | None = None
        self.saved_rates = []
        self.waited = 0.0
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
            batches: This data-parallel rank's packs; each rank has the same number, with dummies at the end.
            observe_states: Whether :meth:`state_norms` is called afterwards.

        Returns:
            Mean cross entropy per target token of the global batch, in nats; NaN where it has no target. Then the
            gradient is zero, and carried states are still computed.
        """
        own = [batch for batch in batches if not batch.dummy]
        counts = [float(sum(batch.num_target_tokens for batch in own)), float(len(own))]
        self.num_targets, self.num_packs = map(round, self.sum(counts if self.counts else [0.0, 0.0]))
        total = float(self.num_targets)
        # Lanes are places in the global batch, where there are no dummies.
        first_lane = pack_range(self.num_packs, self.data_parallel_rank, self.data_parallel_size).start
        pieces = [
            (_NO_LANE if batch.dummy else first_lane + index, piece)
            for index, batch in enumerate(batches)
            for piece in self._pieces(batch)
        ]
        last_own = max((index for index, (lane, _) in enumerate(pieces) if lane != _NO_LANE), default=-1)
        losses: list[torch.Tensor] = []
        routers: list[torch.Tensor] = []
        for index, (lane, piece) in enumerate(pieces):
            last = index + 1 == len(pieces)
            with self.timer.phase("forward"):
                loss_sum = self.carried.forward_loss(
                    self.model, piece, lane, self.device, observe=observe_states and index == last_own
                )
            router_loss = self.carried.router_loss
            with self.timer.phase("backward"):
                whole = loss_sum if router_loss is None else loss_sum + router_loss
                self._backward(whole, total or 1.0, last=last)
            losses.append(loss_sum.detach())
            if router_loss is not None:
                routers.append(router_loss.detach())
        self._losses = [
            (lane - first_lane, loss) for (lane, _), loss in zip(pieces, losses, strict=True) if lane != _NO_LANE
        ]
        sums = [float(torch.stack(values).double().sum()) if values else 0.0 for values in (losses, routers)]
        loss, router = self.sum(sums)
        self.router_loss = router / total if total and routers else None
        return loss / total if total else math.nan

    def _pieces(self, batch: PackedBatch) -> list[PackedBatch]:
        """Return the segments that a pack is run in; a dummy has the same number of them, but short ones."""
        pieces = batch.segments(self.segment_tokens)
        if not batch.dummy:
            return pieces
        most = DUMMY_TOKENS * (self.context.size if self.context else 1)
        cut = (piece.slice(0, min(piece.num_tokens, most)) for piece in pieces)
        return [replace(piece, carried=False, continues=False) for piece in cut]

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluate inside: without gradients or dropout, and with every random generator afterwards as before."""
        states = random_state()
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.model.train()
            set_random_state(states)

    def evaluate(self, batch: PackedBatch) -> float:
        """Return the summed cross entropy of this rank's share of a pack, in nats; for use in :meth:`evaluating`.

        The pack is run in segments as in training, from an empty state; states between packs of the training stay.
        Every rank must call it as often: ZeRO-3 gathers parameters for each call.
        """
        states = CarriedStates(self.context)
        pieces = batch.segments(self.segment_tokens)
        return math.fsum(float(states.forward_loss(self.model, piece, 0, self.device)) for piece in pieces)

    def bad_pack(self) -> int | None:
        """Return the first of this rank's last packs whose loss is not finite, or None."""
        return next((index for index, loss in self._losses if not math.isfinite(float(loss))), None)

    def state_norms(self) -> dict[str, float]:
        """Return the root mean square of each layer's state after the last document of this rank's last pack.

        By layer; empty where it was not observed, or is not known (padding behind it, in a pack over several ranks).
        """
        if self.carried.observed is None:
            return {}
        model: Any = getattr(self.model, "module", self.model)
        layers = [layer for layer, kind in model.state_places if kind == "recurrent"]
        observed = zip(layers, self.carried.observed, strict=True)
        return {str(layer): float(square) ** 0.5 for layer, square in observed}

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

    @abstractmethod
    def gather_row(self, values: Sequence[float]) -> torch.Tensor:
        """Return every rank's ``values`` ``[ranks, values]``, in double precision on the CPU."""

    def take_waited(self) -> float:
        """Return the seconds in :meth:`sum` and :meth:`gather_row` since the last call: mostly for other ranks.

        Work that a GPU has queued before counts too; the loop calls them where nothing is queued.
        """
        waited, self.waited = self.waited, 0.0
        return waited

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

    def ranks_needed(self, world_size: int) -> set[int]:
        """Return the ranks, of ``world_size`` that wrote a checkpoint, whose files :meth:`read` opens."""
        return {self.rank}

    @abstractmethod
    def read(self, directory: Path, manifest: Manifest) -> Any:
        """Return this rank's part of a checkpoint in host memory, compared with the manifest; nothing is changed.

        All ranks call it together; it may raise on one of them only.

        Raises:
            CheckpointError: A file is missing or damaged.
            OSError: One cannot be read.
        """

    @abstractmethod
    def load(self, directory: Path, states: Any) -> dict[str, Any]:
        """Restore what :meth:`read` has returned of the checkpoint ``directory``, and return the client state.

        Learning rate, betas and weight decay stay those of this start; :attr:`saved_rates` holds the old rates.

        Raises:
            CheckpointError: It does not fit this run.
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
    _place_step_counts(optimizer)


def _place_step_counts(optimizer: torch.optim.Optimizer) -> None:
    """Move the step counts of loaded states to where the optimizer of this start needs them.

    torch leaves them where the checkpoint's optimizer had them: a fused one needs them beside the parameters, the
    others on the CPU, where reading one does not wait for the GPU.
    """
    for group in optimizer.param_groups:
        beside = group.get("fused") or group.get("capturable")
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if isinstance(step := state.get("step"), torch.Tensor):
                state["step"] = step.to(parameter.device if beside else "cpu")


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
