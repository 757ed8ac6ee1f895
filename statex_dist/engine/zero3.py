"""DeepSpeed ZeRO-3: parameters, gradients and optimizer states partitioned over all ranks.

The only file that imports deepspeed.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
# Its CPU shared-memory collectives are compiled on first use (two minutes, under a lock that a killed job leaves
# behind). gloo gives the same numbers without a compiler, so the operator is reported as not available.
import deepspeed
import deepspeed.ops

from statex_dist.checkpoint.layout import rank_of
from statex_dist.data.types import PackedBatch
from statex_dist.engine.base import (
    EngineConfig,
    StepResult,
    TrainEngine,
    keep_hyperparameters,
    require_targets,
)
from statex_dist.engine.carry import CarriedStates
from statex_dist.engine.ds_config import deepspeed_config
from statex_dist.errors import CheckpointError
from statex_dist.parallel.env import ProcessEnv

logger = logging.getLogger(__name__)

# What DeepSpeed 0.19 pickles into its files beside tensors and builtins.
_EXPECTED_GLOBALS = {
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
}


def init_process_group(env: ProcessEnv, config: EngineConfig) -> None:
    """Join the other ranks. A process without a launcher becomes a world of one."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    for name, value in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, str(value))
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed 0.19 calls collectives that torch 2.13 renames; every call would warn.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if env.world_size == 1 and "MASTER_PORT" not in os.environ:
        # A fixed port would make two one-process runs on one machine collide.
        store = dist.TCPStore("127.0.0.1", 0, is_master=True)
        dist.init_process_group(env.backend, store=store, rank=0, world_size=1)
    if env.device.type == "cuda":
        torch.cuda.set_device(env.device)
    deepspeed.init_distributed(
        env.backend, timeout=timedelta(minutes=config.timeout_minutes), auto_mpi_discovery=False, verbose=False
    )


class Zero3Engine(TrainEngine):
    """Trains a model with ZeRO stage 3 on all ranks of the process group.

    Args:
        model: Built in full on every rank with the same values; DeepSpeed partitions it.
        optimizer: torch's AdamW over the model's parameters.
        schedule: Over the optimizer.
        config: The engine's section of the run's configuration.
        env: This process.
        gradient_clipping: Largest global gradient norm; 0 for none.
        accumulation_steps: Packs per rank and optimizer step.
    """

    kind = "zero3"

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LambdaLR,
        *,
        config: EngineConfig,
        env: ProcessEnv,
        gradient_clipping: float,
        accumulation_steps: int,
    ):
        self.rank, self.world_size, self.device = env.rank, env.world_size, env.device
        self.accumulation_steps = accumulation_steps
        self.carried = CarriedStates()
        self.optimizer, self.schedule = optimizer, schedule
        settings = deepspeed_config(config, gradient_clipping=gradient_clipping, accumulation_steps=accumulation_steps)
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=settings)
        self.engine.train()

    def forward_backward(self, batches: Sequence[PackedBatch]) -> float:
        """Accumulate the gradient of one global batch (see the base class)."""
        assert len(batches) == self.accumulation_steps
        counts = torch.tensor([sum(batch.num_target_tokens for batch in batches)], dtype=torch.float64)
        total = require_targets(float(self._sum(counts)))
        # DeepSpeed divides by the accumulation steps and averages over ranks; both are undone here, and the true
        # denominator, all target tokens of the global batch, put in their place.
        weight = self.world_size * self.accumulation_steps / total
        local = torch.zeros(1, dtype=torch.float64)
        for index, batch in enumerate(batches):
            lane = self.rank * len(batches) + index
            loss_sum = self.carried.forward_loss(self.engine, batch.to(self.device), lane)
            self.engine.backward(loss_sum * weight)
            local += loss_sum.detach().double().cpu()
            if index + 1 < len(batches):
                self.engine.step()  # counts the micro-step; nothing is updated before the last one
        return float(self._sum(local)) / total

    def step(self) -> StepResult:
        """Clip, update the partitions, advance the schedule."""
        lr = self.optimizer.param_groups[0]["lr"]
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        assert norm is not None, "DeepSpeed computes the global norm in every optimizer step of stage 3"
        return StepResult(grad_norm=float(norm), lr=lr)

    def _sum(self, value: torch.Tensor) -> torch.Tensor:
        value = value.to(self.device)
        dist.all_reduce(value)
        return value.cpu()

    def any_rank(self, flag: bool) -> bool:
        """Return whether ``flag`` is true on any rank."""
        return bool(self._sum(torch.tensor([float(flag)])) > 0)

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

    def _save(self, checkpoints: Path, tag: str, client_state: dict[str, Any]) -> None:
        self.engine.save_checkpoint(str(checkpoints), tag=tag, client_state=client_state, save_latest=False)

    def _load(self, checkpoints: Path, tag: str) -> dict[str, Any]:
        mine = [path for path in (checkpoints / tag).glob("*.pt") if rank_of(path.name) == self.rank]
        # All ranks must stop if one does: the others would wait for it inside DeepSpeed.
        if problems := [
            problem for found in self.gather([foreign_code(path) for path in mine]) for problem in found if problem
        ]:
            raise CheckpointError(problems[0])
        with keep_hyperparameters(self.optimizer, self.schedule):
            loaded, client_state = self.engine.load_checkpoint(str(checkpoints), tag=tag)
        if loaded is None:
            raise CheckpointError(f"DeepSpeed could not load {checkpoints / tag}")
        return client_state


def foreign_code(path: Path) -> str | None:
    """Say what a checkpoint file would run beside DeepSpeed's own classes (its loader runs any pickle), or None."""
    foreign = set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) - _EXPECTED_GLOBALS
    return f"{path} holds foreign code and is refused: {', '.join(sorted(foreign))}" if foreign else None
