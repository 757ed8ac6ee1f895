"""One process, plain PyTorch: the reference that the distributed engines are compared with, and a debugging aid."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from statex_dist.checkpoint.layout import PLAIN_STATE_NAME
from statex_dist.data.types import PackedBatch
from statex_dist.engine.base import StepResult, TrainEngine, keep_hyperparameters, require_targets
from statex_dist.engine.carry import CarriedStates


class PlainEngine(TrainEngine):
    """Trains a model in fp32 on one device.

    Args:
        model: Its forward takes the fields of a batch and returns an object with ``loss_sum``.
        optimizer: Over the model's parameters.
        schedule: Over the optimizer.
        gradient_clipping: Largest global gradient norm; 0 for no clipping.
        device: Where the model lives.
    """

    kind = "plain"

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LambdaLR,
        *,
        gradient_clipping: float,
        device: torch.device,
    ):
        self.model = model.to(device).train()
        self.optimizer = optimizer
        self.schedule = schedule
        self.gradient_clipping = gradient_clipping
        self.device = device
        self.rank, self.world_size = 0, 1
        self.carried = CarriedStates()

    def forward_backward(self, batches: Sequence[PackedBatch]) -> float:
        """Accumulate the gradient of one global batch (see the base class)."""
        total = require_targets(sum(batch.num_target_tokens for batch in batches))
        loss_sum = 0.0
        for lane, batch in enumerate(batches):
            loss = self.carried.forward_loss(self.model, batch.to(self.device), lane) / total
            loss.backward()
            loss_sum += float(loss.detach())
        return loss_sum

    def step(self) -> StepResult:
        """Clip, update, advance the schedule."""
        limit = self.gradient_clipping if self.gradient_clipping > 0 else float("inf")
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        lr = self.optimizer.param_groups[0]["lr"]
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(grad_norm=float(norm), lr=lr)

    def any_rank(self, flag: bool) -> bool:
        """Return ``flag``."""
        return flag

    def barrier(self) -> None:
        """Nobody to wait for."""

    def gather(self, value: Any) -> list[Any]:
        """Return ``[value]``."""
        return [value]

    def broadcast(self, value: Any) -> Any:
        """Return ``value``."""
        return value

    def close(self) -> None:
        """Nothing is held."""

    def _save(self, checkpoints: Path, tag: str, client_state: dict[str, Any]) -> None:
        state = {
            "module": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "client_state": client_state,
        }
        torch.save(state, checkpoints / tag / PLAIN_STATE_NAME)

    def _load(self, checkpoints: Path, tag: str) -> dict[str, Any]:
        state = torch.load(checkpoints / tag / PLAIN_STATE_NAME, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["module"])
        with keep_hyperparameters(self.optimizer, self.schedule):
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
        return state["client_state"]
