"""DeepSpeed ZeRO-3: parameters, gradients and optimizer states partitioned over all ranks."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from torch import nn

from statex_dist.checkpoint.layout import rank_of
from statex_dist.distributed.context_group import ContextGroup
from statex_dist.distributed.env import ProcessEnv
from statex_dist.engine.base import (
    StepResult,
    TrainEngine,
    base_lr,
    check_groups,
    group_name,
    keep_hyperparameters,
)
from statex_dist.engine.segment_states import StatePassing
from statex_dist.engine.zero.foreign_code import foreign_code
from statex_dist.engine.zero.process_group import DEEPSPEED_LOGGER
from statex_dist.errors import CheckpointError

_MODEL_STATES = "_model_states.pt"


class _Capture(TorchCheckpointEngine):
    """Keeps what DeepSpeed would write, so that it can be written crash-safely, and later."""

    def __init__(self) -> None:
        super().__init__()
        self.files: list[tuple[Path, Any]] = []

    def save(self, state_dict: Any, path: str) -> None:
        """Remember one file."""
        self.files.append((Path(path), state_dict))

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make nothing: the directory is there, or on a mount that is gone and must not be made elsewhere."""


class Zero3Engine(TrainEngine):
    """Trains a model with ZeRO stage 3 on all ranks of the process group.

    Args:
        model: In partitions already (:mod:`statex_dist.engine.zero.sharded_start`), or whole, with the same values on
            every rank, and DeepSpeed partitions it.
        optimizer: torch's AdamW over the model's parameters.
        schedule: Over the optimizer.
        settings: DeepSpeed's configuration.
        env: This process.
        segment_tokens: See ``EngineConfig``.
        context: The ranks that share each pack, or None.
        passing: State passing, or None.
    """

    kind = "zero3"

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LambdaLR,
        *,
        settings: dict[str, Any],
        env: ProcessEnv,
        segment_tokens: int = 0,
        context: ContextGroup | None = None,
        passing: StatePassing | None = None,
    ):
        super().__init__(
            rank=env.rank,
            world_size=env.world_size,
            device=env.device,
            segment_tokens=segment_tokens,
            context=context,
            passing=passing,
        )
        self.accumulation_steps = settings["gradient_accumulation_steps"]
        self.optimizer, self.schedule = optimizer, schedule
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=settings)
        self.engine.train()
        self.engine.checkpoint_engine = _Capture()
        # It would copy its converter, a script, into every checkpoint: on a full disk rank 0 would stop at that while
        # the others wait for it. `statex reshard --to hf` is the converter.
        self.engine._copy_recovery_script = lambda _: None
        self.model = self.engine

    def _backward(self, loss_sum: torch.Tensor, total: float, *, last: bool) -> None:
        # How many backward passes make a step depends on the sequence length and the segments, so that the end of the
        # accumulation is said here. DeepSpeed divides by the accumulation steps of its configuration and averages over
        # ranks; both are undone, and the true denominator, all target tokens of the global batch, put in their place.
        weight = self.world_size * self.accumulation_steps / total
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss_sum * weight)
        if not last:
            self.engine.step()  # counts the micro-step; nothing is updated before the last one

    def grad_norms(self) -> dict[str, float]:
        """Return the norm of each parameter group's gradient, summed over the ranks' partitions."""
        zero = self.engine.optimizer
        squares = [torch.zeros((), dtype=torch.float64, device=self.device) for _ in self.optimizer.param_groups]
        for index, parameters in enumerate(zero.fp16_groups):
            square = squares[zero.sub_group_to_group_id[index]]
            if zero.offload_optimizer:
                known = (zero.norm_for_param_grads.get(zero.get_param_id(p)) for p in parameters)
                norms = [norm for norm in known if norm is not None]
            else:
                norms = list(torch._foreach_norm(zero.averaged_gradients[index]))
            for norm in norms:
                square += norm.to(square).square()
        sums = self.sum(torch.stack(squares).tolist())
        return {
            group_name(group, index): total**0.5
            for index, (group, total) in enumerate(zip(self.optimizer.param_groups, sums, strict=True))
        }

    def step(self, *, skip: bool = False) -> StepResult:
        """Clip, update the partitions, advance the schedule."""
        lr = base_lr(self.optimizer)
        if skip:
            self._spoil_gradient()
        skipped = self.engine.skipped_steps
        level = DEEPSPEED_LOGGER.level
        if skip:
            DEEPSPEED_LOGGER.setLevel(logging.ERROR)  # it would blame the gradient that was spoiled here
        self.engine.step()
        DEEPSPEED_LOGGER.setLevel(level)
        updated = self.engine.skipped_steps == skipped
        if not updated:
            self.schedule.step()  # DeepSpeed leaves it where it was; here it is a function of the step
        return StepResult(updated=updated, lr=lr)

    def _spoil_gradient(self) -> None:
        """Make DeepSpeed drop this step: it does so, and only so, where the gradient is not finite."""
        zero = self.engine.optimizer
        if zero.offload_optimizer:
            for norm in zero.norm_for_param_grads.values():
                norm.fill_(torch.nan)
        else:
            for gradients in zero.averaged_gradients.values():
                gradients[0].fill_(torch.nan)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the sums of ``values`` over all ranks."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        start = time.perf_counter()
        dist.all_reduce(tensor)
        sums = tensor.tolist()
        self.waited += time.perf_counter() - start
        return sums

    def gather_row(self, values: Sequence[float]) -> torch.Tensor:
        """Return every rank's ``values``."""
        row = torch.tensor(values, dtype=torch.float64, device=self.device)
        table = row.new_empty(self.world_size * len(values))
        start = time.perf_counter()
        dist.all_gather_into_tensor(table, row)
        rows = table.cpu().view(self.world_size, -1)
        self.waited += time.perf_counter() - start
        return rows

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier()

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's ``value``, by rank."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's ``value``."""
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def close(self) -> None:
        """Leave the process group."""
        self.engine.destroy()
        if dist.is_initialized():
            dist.destroy_process_group()

    def capture(self, directory: Path, client_state: Mapping[str, Any]) -> list[tuple[Path, Any]]:
        """Return what DeepSpeed would write for this rank."""
        self.engine.checkpoint_engine.files = []
        self.engine.save_checkpoint(
            str(directory.parent), tag=directory.name, client_state=dict(client_state), save_latest=False
        )
        files, self.engine.checkpoint_engine.files = self.engine.checkpoint_engine.files, []
        return files

    def load(self, directory: Path) -> dict[str, Any]:
        """Restore from ``directory``; learning rate, betas and weight decay stay those of this start.

        Raises:
            CheckpointError: A file holds code beside DeepSpeed's own, or DeepSpeed refuses the checkpoint.
        """
        mine = [path for path in directory.glob("*.pt") if rank_of(path.name) == self.rank]
        # All ranks must stop if one does: the others would wait for it inside DeepSpeed.
        if problems := [
            problem for found in self.gather([foreign_code(path) for path in mine]) for problem in found if problem
        ]:
            raise CheckpointError(problems[0])
        for path in mine:
            if path.name.endswith(_MODEL_STATES):
                content = torch.load(
                    path, map_location="cpu", mmap=True, weights_only=False
                )  # foreign code was refused above
                saved, ours = content["param_shapes"], self.engine._get_zero_param_shapes()
                check_groups([list(g.items()) for g in saved], [list(g.items()) for g in ours], directory)
        with keep_hyperparameters(self.optimizer, self.schedule) as self.saved_rates:
            loaded, client_state = self.engine.load_checkpoint(str(directory.parent), tag=directory.name)
        if loaded is None:
            raise CheckpointError(f"DeepSpeed could not load {directory}")
        return client_state
