"""The whole configuration of a training run; rules that span sections live here and nowhere else."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from statex_dist.batch import most_packs, num_segments
from statex_dist.config import flat, to_dict
from statex_dist.data.config import DataConfig
from statex_dist.distributed.context_group import ParallelConfig
from statex_dist.engine.config import EngineConfig
from statex_dist.errors import ConfigError
from statex_dist.models.model_section import ModelSource
from statex_dist.optim.groups import OptimizerConfig
from statex_dist.optim.schedule import ScheduleConfig
from statex_dist.redact import redact, redacted
from statex_dist.train.callback import parse_entry
from statex_dist.train.config import TrainConfig
from statex_dist.train.guard import GuardConfig
from statex_dist.train.metrics import MetricsConfig
from statex_dist.train.profile import ProfileConfig
from statex_dist.train.validation import EvalConfig

MIN_SHARE = 8
"""Tokens of a sequence that a rank of a context group has at least: more than any convolution reaches back."""


@dataclass(kw_only=True)
class RunConfig:
    """A training run.

    Attributes:
        run_dir: Where configuration, metrics and checkpoints go; a run found there is resumed.
        model: The model.
        data: The data.
        train: How long, how often to save.
        seed: Of the data order and of a new model's parameters.
        engine: How it is computed.
        parallel: How ranks share sequences.
        guard: When a step is skipped.
        optimizer: What updates the parameters.
        schedule: Learning rate.
        metrics: What is reported.
        profile: Steps that torch's profiler looks into.
        eval: Validation in training.
        callbacks: Further callbacks: a registered name or ``module:Class``, or a mapping of one such name to its
            options.
    """

    run_dir: str
    model: ModelSource
    data: DataConfig
    train: TrainConfig
    seed: int = 0
    engine: EngineConfig = field(default_factory=EngineConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    callbacks: list[str | dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.run_dir:
            raise ConfigError("run_dir must not be empty")
        if re.match(r"[A-Za-z][\w+.-]*://", self.run_dir):  # it would be a directory with the password in its name
            raise ConfigError(f"run_dir {self.run_dir} is a URL; give a directory that all ranks share")
        for entry in self.callbacks:
            parse_entry(entry)
        if shared := set(self.eval.paths.values()) & set(self.data.paths.values()):
            raise ConfigError(
                f"eval.data {redact(min(shared))} is training data too; give eval.held_out to keep a share of it out "
                "of the training, or other data"
            )
        if self.parallel.context > 1 and self.train.state_passing:
            raise ConfigError(
                "train.state_passing needs parallel.context 1: the ranks of a context group know only the state at "
                "their pack's end; use engine.segment_tokens for long sequences instead"
            )
        if not self.train.shared_run_dir and self.engine.stage < 3:
            raise ConfigError(
                f"train.shared_run_dir false needs engine.stage 3: in stage {self.engine.stage} one rank writes the "
                "model, and ranks on other hosts could not read it"
            )
        segment = self.engine.segment_tokens
        share = min(s.seq_len // num_segments(s.seq_len, segment) for s in self.data.stages()) // self.parallel.context
        if self.parallel.context > 1 and share < MIN_SHARE:
            raise ConfigError(
                f"parallel.context={self.parallel.context} leaves {share} tokens to a rank, at least {MIN_SHARE} are "
                "needed; lower it, or raise data.seq_len or engine.segment_tokens"
            )

    def resolved(self) -> dict[str, Any]:
        """Return the configuration as ``config.yaml``, checkpoints and wandb have it."""
        return redacted(to_dict(self))

    def shared_settings(self) -> dict[str, object]:
        """Return the settings that must be equal on all ranks, by dotted name, without secrets."""
        # Each host has a cache of its own, perhaps under another path.
        return {k: v for k, v in flat(self.resolved()).items() if k not in ("data.cache_dir", "data.cache_limit")}

    def check_ranks(self, world_size: int) -> None:
        """Raise if this number of ranks cannot run it.

        Raises:
            ConfigError: The engine has one process, or there are more ranks than packs of a step.
        """
        if self.engine.name == "plain" and world_size > 1:
            raise ConfigError(f"engine.name plain runs in one process, not {world_size}; use engine.name deepspeed")
        self.accumulation_steps(world_size)

    def import_parts(self) -> None:
        """Import optimizer and schedule, which may be a user's.

        Raises:
            ConfigError: One cannot be imported.
        """
        _ = self.optimizer.factory, self.schedule.shape

    def accumulation_steps(self, world_size: int) -> int:
        """Return the packs per data-parallel rank and step; where they do not divide, some ranks have one less.

        Raises:
            ConfigError: The ranks do not divide into context groups, or a group would have no pack.
        """
        size, packs = self.parallel.data_parallel_size(world_size), self.data.packs_per_step
        if packs < size:
            context = "" if self.parallel.context == 1 else f" in {size} context groups"
            raise ConfigError(
                f"data.packs_per_step={packs} is too few for {world_size} ranks{context}; set it to {size} or more, "
                f"start at most {packs * self.parallel.context} ranks, or raise parallel.context"
            )
        return most_packs(packs, size)
