"""The whole configuration of a training run; rules that span sections live here and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from statex_dist.engine.base import EngineConfig
from statex_dist.errors import ConfigError
from statex_dist.optim.groups import OptimizerConfig
from statex_dist.optim.schedule import ScheduleConfig
from statex_dist.train.loop import TrainConfig
from statex_dist.train.metrics import MetricsConfig


@dataclass(kw_only=True)
class ModelSource:
    """The model to train: an existing one or a new one.

    Attributes:
        path: Directory with ``config.json`` and safetensors, to train on from there.
        config: Contents of a ``config.json`` (``model_type`` and so on), to start a new model.
    """

    path: str | None = None
    config: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if (self.path is None) == (self.config is None):
            raise ConfigError("model: give either model.path (a model directory) or model.config (a new model)")


@dataclass(kw_only=True)
class DataSource:
    """The training data.

    Attributes:
        path: Directory of shards, as ``statex prepare`` makes it.
        seq_len: Tokens of a packed sequence.
        packs_per_step: Packed sequences per optimizer step over all ranks; what one rank cannot hold at once becomes
            gradient accumulation.
        packing: ``best_fit`` (arXiv 2404.10830), ``concat`` (cut at the length) or ``one_document``.
        window_tokens: Tokens within which documents are shuffled and packed together.
    """

    path: str
    seq_len: int = 65536
    packs_per_step: int = 8
    packing: Literal["best_fit", "concat", "one_document"] = "best_fit"
    window_tokens: int = 1 << 26

    def __post_init__(self) -> None:
        for name in ("seq_len", "packs_per_step", "window_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"data.{name} must be 1 or more, not {getattr(self, name)}")


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
        optimizer: AdamW.
        schedule: Learning rate.
        metrics: What is reported.
    """

    run_dir: str
    model: ModelSource
    data: DataSource
    train: TrainConfig
    seed: int = 0
    engine: EngineConfig = field(default_factory=EngineConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)

    def __post_init__(self) -> None:
        if not self.run_dir:
            raise ConfigError("run_dir must not be empty")

    def accumulation_steps(self, world_size: int) -> int:
        """Return the packs per rank and step.

        Raises:
            ConfigError: The packs of a step do not divide over the ranks.
        """
        if self.data.packs_per_step % world_size:
            raise ConfigError(
                f"data.packs_per_step={self.data.packs_per_step} does not divide over {world_size} ranks; "
                f"set it to a multiple of {world_size}"
            )
        return self.data.packs_per_step // world_size
