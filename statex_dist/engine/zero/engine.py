"""DeepSpeed ZeRO: optimizer states, gradients and parameters partitioned over all ranks, as the stage says."""

from __future__ import annotations

import contextlib
import io
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

from statex_dist.checkpoint.formats.zero3.layout import WHOLE_MODEL_NAME
from statex_dist.checkpoint.layout import client_file, rank_of
from statex_dist.checkpoint.manifest import Manifest
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
from statex_dist.engine.deepspeed_keys import ZERO
from statex_dist.engine.segment_states import StatePassing
from statex_dist.engine.zero.foreign_code import foreign_code
from statex_dist.engine.zero.gradients import CheckedOptimizer, gradients_of
from statex_dist.engine.zero.loading import cut_of, exchange, restore
from statex_dist.engine.zero.process_group import DEEPSPEED_LOGGER
from statex_dist.engine.zero.reading import SavedStates, needed_ranks, read_own, read_pieces
from statex_dist.engine.zero.recut import recut
from statex_dist.errors import CheckpointError

logger = logging.getLogger(__name__)

_MODEL_STATES = "_model_states.pt"


class _Capture(TorchCheckpointEngine):
    """Keeps what DeepSpeed would write, so that it can be written crash-safely, and later.

    Attributes:
        files: What it would have written.
        made: Contents that it is to find in files of these names, whatever the files hold.
    """

    def __init__(self) -> None:
        super().__init__()
        self.files: list[tuple[Path, Any]] = []
        self.made: dict[str, Any] = {}

    def load(self, path: str, map_location: Any = None) -> Any:
        """Return the contents of a file."""
        name = Path(path).name
        return self.made[name] if name in self.made else super().load(path, map_location=map_location)

    def save(self, state_dict: Any, path: str) -> None:
        """Remember one file."""
        self.files.append((Path(path), state_dict))

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make nothing: the directory is there, or on a mount that is gone and must not be made elsewhere."""


class ZeroEngine(TrainEngine):
    """Trains a model with a stage of ZeRO on all ranks of the process group.

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
        self.stage: int = settings[ZERO]["stage"]
        self.kind = f"zero{self.stage}"
        self.in_folders = self.stage == 3
        self.accumulation_steps = settings["gradient_accumulation_steps"]
        self.optimizer, self.schedule = optimizer, schedule
        with _silent():
            self.engine, *_ = deepspeed.initialize(
                model=model, optimizer=optimizer, lr_scheduler=schedule, config=settings
            )
        if self.stage == 0:
            self.engine.optimizer = CheckedOptimizer(self.engine.optimizer)
        self._gradients = gradients_of(self.engine.optimizer)
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
        squares = [torch.zeros((), dtype=torch.float64, device=self.device) for _ in self.optimizer.param_groups]
        for group, norms in self._gradients.norms():
            for norm in norms:
                squares[group] += norm.to(squares[group]).square()
        sums = self.sum(torch.stack(squares).tolist())
        return {
            group_name(group, index): total**0.5
            for index, (group, total) in enumerate(zip(self.optimizer.param_groups, sums, strict=True))
        }

    def step(self, *, skip: bool = False) -> StepResult:
        """Clip, update the partitions, advance the schedule."""
        lr = base_lr(self.optimizer)
        if skip:
            self._gradients.spoil()
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
        # Below stage 3 rank 0 alone writes model states, and each rank has a client state of its own.
        inside = dict(client_state) if self.stage == 3 else {}
        self.engine.save_checkpoint(str(directory.parent), tag=directory.name, client_state=inside, save_latest=False)
        files, self.engine.checkpoint_engine.files = self.engine.checkpoint_engine.files, []
        if self.stage < 3:
            for _, content in files:
                self._complete(content)
            files.append((directory / client_file(self.rank), dict(client_state)))
        return files

    def _complete(self, content: dict[str, Any]) -> None:
        """Add to a file what DeepSpeed leaves out of it, and readers need: shapes and ties, or the stage."""
        if "module" in content and self.stage == 0:
            content |= {"param_shapes": self._shapes(), "shared_params": self.engine._get_shared_params()}
        elif "module" not in content:
            content["optimizer_state_dict"].setdefault("zero_stage", self.stage)

    def _shapes(self) -> list[dict[str, Any]]:
        """Return the shapes of each parameter group's parameters, by name in their order."""
        if self.stage > 0:
            return self.engine._get_zero_param_shapes()
        names = self.engine.param_names
        return [{names[p]: p.shape for p in group["params"]} for group in self.optimizer.param_groups]

    def ranks_needed(self, world_size: int) -> set[int]:
        """Return the ranks, of ``world_size`` that wrote a checkpoint, whose files :meth:`read` opens."""
        if world_size == self.world_size:
            return {self.rank}
        cut = cut_of(self.engine, rank=self.rank, world_size=self.world_size)
        return needed_ranks(cut, [tuple(p.ds_shape) for p in self.engine.module.parameters()], world_size)

    def read(self, directory: Path, manifest: Manifest) -> SavedStates | None:
        """Read this rank's part of a checkpoint of stage 3, of any number of ranks; below it the files are verified."""
        if self.stage < 3:
            for name, record in manifest.files.items():
                rank = rank_of(name)
                if rank is not None and rank % self.world_size == self.rank:
                    record.check(directory / name)
            return None
        cut = cut_of(self.engine, rank=self.rank, world_size=self.world_size)
        if manifest.info.get("world_size") == self.world_size:
            return read_own(directory, manifest, cut)
        return read_pieces(directory, manifest, cut, lambda values: exchange(values, self.device))

    def load(self, directory: Path, states: SavedStates | None) -> dict[str, Any]:
        """Restore what :meth:`read` has returned; below stage 3 DeepSpeed reads the files.

        Raises:
            CheckpointError: The parameters are in other groups.
        """
        with keep_hyperparameters(self.optimizer, self.schedule) as self.saved_rates:
            if states is None:
                return self._load_whole(directory)
            cut = cut_of(self.engine, rank=self.rank, world_size=self.world_size)
            same = states.world_size == self.world_size
            check_groups(states.groups, [list(g.items()) for g in cut.sub_groups] if same else cut.groups, directory)
            return restore(self.engine, states)

    def _load_whole(self, directory: Path) -> dict[str, Any]:
        """Restore from the files of a stage below 3 with DeepSpeed's loader, which runs any pickle."""
        # Files without a rank are read by all, and another number of ranks may have written the others.
        ranks = {path: rank_of(path.name) for path in sorted(directory.glob("*.pt"))}
        mine = [path for path, rank in ranks.items() if rank is None or rank % self.world_size == self.rank]
        # All ranks must stop if one does: the others would wait for it inside DeepSpeed.
        found = self.gather([foreign_code(path, self.stage) for path in mine])
        if problems := [problem for texts in found for problem in texts if problem]:
            raise CheckpointError(problems[0])
        written_by = self.world_size
        for path in mine:
            if path.name.endswith(_MODEL_STATES):
                content = torch.load(
                    path, map_location="cpu", mmap=True, weights_only=False
                )  # foreign code was refused above
                saved, ours = content["param_shapes"], self._shapes()
                check_groups([list(g.items()) for g in saved], [list(g.items()) for g in ours], directory)
                written_by = content["dp_world_size"]
        clipping = getattr(self.engine.optimizer, "clip_grad", None)
        if written_by != self.world_size:
            self.engine.checkpoint_engine.made = self._recut(directory, content)
        with _silent():
            loaded, _ = self.engine.load_checkpoint(str(directory.parent), tag=directory.name)
        self.engine.checkpoint_engine.made = {}
        if clipping is not None:
            self.engine.optimizer.clip_grad = clipping  # stages 1 and 2 take the checkpoint's
        if loaded is None:
            raise CheckpointError(f"DeepSpeed could not load {directory}")
        return self._client_state(directory, written_by)

    def _recut(self, directory: Path, model: dict[str, Any]) -> dict[str, Any]:
        """Return a checkpoint's files, by name, as this number of ranks would have written them, in stages 0 to 2."""
        made: dict[str, Any] = {WHOLE_MODEL_NAME: {**model, "dp_world_size": self.world_size}}
        if self.stage > 0:
            sizes = [group["params"][0].numel() for group in self.optimizer.param_groups]
            lengths = [sum(shape.numel() for shape in shapes.values()) for shapes in self._shapes()]
            name = Path(self.engine._get_zero_ckpt_name(str(directory.parent), directory.name)).name
            made[name] = recut(directory, lengths, sizes, rank=self.rank, world_size=self.world_size)
        return made

    def _client_state(self, directory: Path, written_by: int) -> dict[str, Any]:
        """Return this rank's client state, in stages 0 to 2; further ranks get those of the first ones again."""
        state = torch.load(directory / client_file(self.rank % written_by), weights_only=True)
        if written_by != self.world_size and state.pop("carried", None) and self.rank == 0:
            logger.warning(
                "%s was written by %d ranks: states between packs are left out; sequences that would begin from one of "
                "them begin from an empty state",
                *(directory, written_by),
            )
        return state


def _silent() -> contextlib.redirect_stdout[io.StringIO]:
    """Return a context that drops what DeepSpeed prints for its developers; its logger's messages stay."""
    return contextlib.redirect_stdout(io.StringIO())
