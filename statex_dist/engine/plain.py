"""One process, plain PyTorch: the reference that the distributed engines are compared with, and a debugging aid."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from statex_dist.checkpoint.layout import PLAIN_STATE_NAME
from statex_dist.checkpoint.manifest import Manifest
from statex_dist.engine.base import (
    StepResult,
    TrainEngine,
    base_lr,
    check_groups,
    group_name,
    keep_hyperparameters,
)
from statex_dist.engine.saved_file import SavedFile
from statex_dist.engine.segment_states import StatePassing


class PlainEngine(TrainEngine):
    """Trains a model in fp32 on one device.

    Args:
        model: Its forward takes the fields of a batch and returns an object with ``loss_sum``.
        optimizer: Over the model's parameters.
        schedule: Over the optimizer.
        gradient_clipping: Largest global gradient norm; 0 for no clipping.
        device: Where the model lives.
        segment_tokens: See ``EngineConfig``.
        passing: State passing, or None.
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
        segment_tokens: int = 0,
        passing: StatePassing | None = None,
    ):
        super().__init__(
            rank=0, world_size=1, device=device, segment_tokens=segment_tokens, context=None, passing=passing
        )
        self.model = model.to(device).train()
        self.optimizer = optimizer
        self.schedule = schedule
        self.gradient_clipping = gradient_clipping

    def _backward(self, loss_sum: torch.Tensor, total: float, *, last: bool) -> None:
        (loss_sum / total).backward()

    def grad_norms(self) -> dict[str, float]:
        """Return the norm of each parameter group's gradient."""
        return {
            group_name(group, index): float(
                nn.utils.get_total_norm([p.grad for p in group["params"] if p.grad is not None])
            )
            for index, group in enumerate(self.optimizer.param_groups)
        }

    def step(self, *, skip: bool = False) -> StepResult:
        """Clip, update, advance the schedule."""
        lr = base_lr(self.optimizer)
        if not skip:
            limit = self.gradient_clipping if self.gradient_clipping > 0 else float("inf")
            nn.utils.clip_grad_norm_(self.model.parameters(), limit)
            self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(updated=not skip, lr=lr)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return ``values``."""
        return list(values)

    def gather_row(self, values: Sequence[float]) -> torch.Tensor:
        """Return ``[values]``."""
        return torch.tensor([list(values)], dtype=torch.float64)

    def barrier(self) -> None:
        """Return at once: there is no other rank."""

    def gather(self, value: Any) -> list[Any]:
        """Return ``[value]``."""
        return [value]

    def broadcast(self, value: Any) -> Any:
        """Return ``value``."""
        return value

    def close(self) -> None:
        """Nothing is held."""

    def capture(self, directory: Path, client_state: Mapping[str, Any]) -> list[tuple[Path, Any]]:
        """Return the one file's contents."""
        state = {
            "module": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "client_state": dict(client_state),
        }
        return [(directory / PLAIN_STATE_NAME, state)]

    def read(self, directory: Path, manifest: Manifest) -> dict[str, Any]:
        """Read the one file and verify it."""
        file = SavedFile(directory / PLAIN_STATE_NAME, manifest.files[PLAIN_STATE_NAME])
        states: dict[str, Any] = file.tensors(file.archive.content)
        return states

    def load(self, directory: Path, states: dict[str, Any]) -> dict[str, Any]:
        """Restore what :meth:`read` has returned; learning rate, betas and weight decay stay those of this start."""
        saved, ours = states["optimizer"]["param_groups"], self.optimizer.param_groups
        check_groups([len(group["params"]) for group in saved], [len(group["params"]) for group in ours], directory)
        self.model.load_state_dict(states["module"])
        with keep_hyperparameters(self.optimizer, self.schedule) as self.saved_rates:
            self.optimizer.load_state_dict(copy.deepcopy(states["optimizer"]))  # it keeps tensors; these are of a file
            self.schedule.load_state_dict(states["schedule"])
        client_state: dict[str, Any] = states["client_state"]
        return client_state
