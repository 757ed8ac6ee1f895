"""The seam between the training loop and whatever computes: forward, backward, step, save, load.

Saving is the same for every engine: all ranks write into a temporary directory and sync their files, rank 0 writes the
manifest, renames the directory and moves ``latest``. Whenever the job is killed there is a complete checkpoint or none.
"""

from __future__ import annotations

import json
import logging
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from statex_dist.checkpoint.layout import (
    CONFIG_NAME,
    LATEST_NAME,
    MANIFEST_NAME,
    MODEL_DIR,
    TEMPORARY_PREFIX,
    complete_tags,
    rank_of,
    step_of,
    tag_of,
)
from statex_dist.checkpoint.manifest import (
    FileRecord,
    Manifest,
    commit_directory,
    record_file,
    write_durably,
)
from statex_dist.data.types import PackedBatch
from statex_dist.engine.carry import CarriedStates
from statex_dist.errors import CheckpointError, ConfigError, DataError

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class EngineConfig:
    """How the model is trained.

    Attributes:
        name: ``zero3`` (DeepSpeed, any number of ranks) or ``plain`` (PyTorch, one process).
        precision: Of parameters and activations; optimizer states and master weights are fp32 either way.
        activation_checkpointing: ``block`` recomputes each layer in the backward pass.
        param_persistence_threshold: ZeRO-3 keeps parameters with fewer elements whole on every rank.
        sub_group_size: Elements that ZeRO-3's optimizer updates at once, per rank.
        timeout_minutes: After which a collective gives up on a dead peer.
    """

    name: Literal["zero3", "plain"] = "zero3"
    precision: Literal["bf16", "fp32"] = "bf16"
    activation_checkpointing: Literal["none", "block"] = "none"
    param_persistence_threshold: int = 100_000
    sub_group_size: int = 1_000_000_000
    timeout_minutes: float = 30.0

    def __post_init__(self) -> None:
        if self.name == "plain" and self.precision != "fp32":
            raise ConfigError(f"engine.name plain trains in fp32; set engine.precision to fp32, not {self.precision}")
        for name in ("sub_group_size", "timeout_minutes"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"engine.{name} must be above 0, not {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What an optimizer step reports: global gradient norm before clipping, and the learning rate that was used."""

    grad_norm: float
    lr: float


class TrainEngine(ABC):
    """Computes training steps on this rank's share of the batch."""

    kind: str
    rank: int
    world_size: int
    carried: CarriedStates

    @abstractmethod
    def forward_backward(self, batches: Sequence[PackedBatch]) -> float:
        """Accumulate the gradient of one global batch.

        The loss is weighted by target token over *all* ranks, so that unevenly filled packs do not bias the gradient.

        Args:
            batches: This rank's packs, as many on every rank.

        Returns:
            Mean cross entropy per target token of the global batch, in nats.
        """

    @abstractmethod
    def step(self) -> StepResult:
        """Clip, update the parameters, advance the schedule and clear the gradients."""

    @abstractmethod
    def any_rank(self, flag: bool) -> bool:
        """Return whether ``flag`` is true on any rank."""

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
    def _save(self, checkpoints: Path, tag: str, client_state: dict[str, Any]) -> None:
        """Write this rank's files into ``checkpoints / tag``."""

    @abstractmethod
    def _load(self, checkpoints: Path, tag: str) -> dict[str, Any]:
        """Restore from ``checkpoints / tag`` and return the client state."""

    def save(self, checkpoints: Path, step: int, client_state: dict[str, Any], model_files: Mapping[str, str]) -> Path:
        """Write a complete checkpoint, or none.

        Args:
            checkpoints: The run's directory of checkpoints.
            step: Optimizer steps done.
            client_state: Plain values to get back from :meth:`load`.
            model_files: Text files that describe the model (``config.json``, tokenizer), by name.

        Returns:
            The checkpoint's directory.
        """
        target, temporary = checkpoints / tag_of(step), checkpoints / f"{TEMPORARY_PREFIX}{tag_of(step)}"
        if self.rank == 0:
            checkpoints.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
        self.barrier()
        mine: dict[str, dict[str, Any]] = {}
        problem = None
        try:
            carried = self.carried.state_dict()
            kept = {"step": step, **client_state, **({"carried": carried} if carried else {})}
            self._save(checkpoints, temporary.name, kept)
            for path in temporary.iterdir():
                owner = rank_of(path.name)
                if path.is_file() and (owner == self.rank or (self.rank == 0 and owner is None)):
                    mine[path.name] = asdict(record_file(path))
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            problem = f"checkpoint {target} cannot be written by rank {self.rank}: {error}"
        # No rank goes on alone: the others would wait for it until the collective's timeout.
        reports = self.gather((problem, mine))
        if problems := [text for text, _ in reports if text]:
            raise CheckpointError(problems[0])
        if self.rank == 0:
            files = {name: FileRecord(**record) for _, part in reports for name, record in part.items()}
            (temporary / MODEL_DIR).mkdir()
            for name, text in model_files.items():
                write_durably(temporary / MODEL_DIR / name, text)
                files[f"{MODEL_DIR}/{name}"] = record_file(temporary / MODEL_DIR / name)
            info = {"step": step, "world_size": self.world_size}
            Manifest(kind=self.kind, files=files, info=info).write(temporary)
            if target.exists():
                # Only a directory without a manifest is ever in the way: resuming starts after the newest complete one.
                if (target / MANIFEST_NAME).is_file():
                    raise CheckpointError(f"{target} is already complete; a checkpoint is never overwritten")
                shutil.rmtree(target)
            commit_directory(temporary, target)
            write_durably(checkpoints / LATEST_NAME, target.name)
        self.barrier()
        return target

    def load(self, checkpoints: Path, model_files: Mapping[str, str]) -> dict[str, Any] | None:
        """Restore the newest complete checkpoint; learning rate, betas and weight decay stay those of this start.

        Args:
            checkpoints: The run's directory of checkpoints.
            model_files: As in :meth:`save`; the checkpoint must be of the same model.

        Returns:
            The client state, or None where the run has not saved anything yet.

        Raises:
            CheckpointError: Files are damaged, there is no complete checkpoint although ``latest`` names one, or it
                is of another model or was written by another number of ranks.
        """
        found: tuple[str | None, str | None] = (None, None)
        if self.rank == 0:
            try:
                found = (self._find(checkpoints, model_files), None)
            except CheckpointError as error:
                found = (None, str(error))
        tag, problem = self.broadcast(found)
        if problem:
            raise CheckpointError(problem)
        if tag is None:
            return None
        logger.info("resuming from %s", checkpoints / tag)
        client_state = self._load(checkpoints, tag)
        self.carried.load_state_dict(client_state.pop("carried", {}))
        return client_state

    def _find(self, checkpoints: Path, model_files: Mapping[str, str]) -> str | None:
        tags = complete_tags(checkpoints)
        if not tags:
            if (checkpoints / LATEST_NAME).exists():
                raise CheckpointError(
                    f"{checkpoints / LATEST_NAME} exists but no checkpoint there is complete; "
                    "restore one, or start in another run directory"
                )
            return None
        directory = checkpoints / tags[0]
        manifest = Manifest.read(directory)
        if manifest.kind != self.kind:
            raise CheckpointError(
                f"{directory} was written by engine {manifest.kind}, this run uses {self.kind}; "
                f"give --engine.name {manifest.kind}, or another run_dir"
            )
        if manifest.info.get("world_size") != self.world_size:
            raise CheckpointError(
                f"{directory} was written by {manifest.info.get('world_size')} ranks, this run has {self.world_size}; "
                f"start it with as many, or reshard it: statex reshard --to zero3 --world-size {self.world_size}"
            )
        manifest.verify(directory)
        saved = json.loads((directory / MODEL_DIR / CONFIG_NAME).read_text(encoding="utf-8"))
        given = json.loads(model_files[CONFIG_NAME])
        if other := sorted(key for key in saved.keys() | given.keys() if saved.get(key) != given.get(key)):
            raise CheckpointError(
                f"{directory} is of another model (config.json differs in {', '.join(other)}); "
                "give the model that this run began with, or another run_dir"
            )
        return tags[0]


def require_targets(total: float) -> float:
    """Return ``total``, the target tokens of a global batch, if there are any.

    Raises:
        DataError: There are none: a step would only decay the weights.
    """
    if not total:
        raise DataError(
            "no token of this step's batch is to be learned: all are padding, masked, or of damaged shards that were "
            "skipped; look at the data"
        )
    return total


@contextmanager
def keep_hyperparameters(
    optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LambdaLR
) -> Iterator[None]:
    """Restore states inside, but not the settings that come with them: those of the configuration stay in force."""
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    base_lrs = list(schedule.base_lrs)
    yield
    schedule.base_lrs = base_lrs
    for group, kept, base_lr, factor in zip(
        optimizer.param_groups, settings, base_lrs, schedule.lr_lambdas, strict=True
    ):
        group.update(kept, lr=base_lr * factor(schedule.last_epoch))


def prune(checkpoints: Path, keep_last: int) -> None:
    """Delete all but the newest ``keep_last`` complete checkpoints, and what killed saves left behind.

    A checkpoint is first renamed to a temporary name: killed half-way, it is not taken for a complete one.
    """
    for leftover in checkpoints.glob(f"{TEMPORARY_PREFIX}*"):
        if leftover.is_dir():
            shutil.rmtree(leftover)
    for tag in complete_tags(checkpoints)[keep_last:]:
        assert step_of(tag) is not None
        doomed = checkpoints / f"{TEMPORARY_PREFIX}delete-{tag}"
        (checkpoints / tag).replace(doomed)
        shutil.rmtree(doomed)
