"""The whole configuration of a training run; rules that span sections live here and nowhere else."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from statex_dist.batch import num_segments
from statex_dist.data.config import DataConfig
from statex_dist.distributed.context_group import ParallelConfig
from statex_dist.engine.base import EngineConfig
from statex_dist.errors import ConfigError
from statex_dist.optim.groups import OptimizerConfig
from statex_dist.optim.schedule import ScheduleConfig
from statex_dist.train.guard import GuardConfig
from statex_dist.train.loop import TrainConfig
from statex_dist.train.metrics import MetricsConfig
from statex_dist.train.profile import ProfileConfig

MIN_SHARE = 8
"""Tokens of a sequence that a rank of a context group has at least: more than any convolution reaches back."""


@dataclass(kw_only=True)
class ModelSource:
    """The model to train: an existing one or a new one.

    Attributes:
        path: Model directory, or a checkpoint of any layout (a run: its newest), to train on from there.
        config: Contents of a ``config.json`` (``model_type`` and so on), to start a new model.
        check_digests: Whether the weights in ``path`` are compared with the digests of its manifest and archives'
            checksums; sizes always are.
    """

    path: str | None = None
    config: dict[str, Any] | None = None
    check_digests: bool = True

    def __post_init__(self) -> None:
        if (self.path is None) == (self.config is None):
            raise ConfigError("model: give either model.path (a model directory) or model.config (a new model)")


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
        optimizer: AdamW.
        schedule: Learning rate.
        metrics: What is reported.
        profile: Steps that torch's profiler looks into.
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

    def __post_init__(self) -> None:
        if not self.run_dir:
            raise ConfigError("run_dir must not be empty")
        if re.match(r"[A-Za-z][\w+.-]*://", self.run_dir):  # it would be a directory with the password in its name
            raise ConfigError(f"run_dir {self.run_dir} is a URL; give a directory that all ranks share")
        if self.parallel.context > 1 and self.train.state_passing:
            raise ConfigError(
                "train.state_passing needs parallel.context 1: the ranks of a context group know only the state at "
                "their pack's end; use engine.segment_tokens for long sequences instead"
            )
        segment = self.engine.segment_tokens
        share = min(s.seq_len // num_segments(s.seq_len, segment) for s in self.data.stages()) // self.parallel.context
        if self.parallel.context > 1 and share < MIN_SHARE:
            raise ConfigError(
                f"parallel.context={self.parallel.context} leaves {share} tokens to a rank, at least {MIN_SHARE} are "
                "needed; lower it, or raise data.seq_len or engine.segment_tokens"
            )

    def accumulation_steps(self, world_size: int) -> int:
        """Return the packs per data-parallel rank and step.

        Raises:
            ConfigError: The packs of a step do not divide over the ranks.
        """
        size = self.parallel.data_parallel_size(world_size)
        if self.data.packs_per_step % size:
            context = "" if self.parallel.context == 1 else f" in context groups of {self.parallel.context}"
            raise ConfigError(
                f"data.packs_per_step={self.data.packs_per_step} does not divide over {world_size} ranks{context}; "
                f"set it to a multiple of {size}"
            )
        return self.data.packs_per_step // size
