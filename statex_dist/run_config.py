"""The whole configuration of a training run; rules that span sections live here and nowhere else."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from statex_dist.batch import num_segments
from statex_dist.config import flat, parse_size, to_dict
from statex_dist.data.loader import ONLY_SOURCE
from statex_dist.data.mixture import Stage
from statex_dist.distributed.context_group import ParallelConfig
from statex_dist.engine.config import EngineConfig
from statex_dist.errors import ConfigError
from statex_dist.models.model_section import ModelSource
from statex_dist.optim.groups import OptimizerConfig
from statex_dist.optim.schedule import ScheduleConfig
from statex_dist.redact import bare_url, holds_secret, redact, redacted
from statex_dist.train.callback import parse_entry
from statex_dist.train.config import TrainConfig
from statex_dist.train.guard import GuardConfig
from statex_dist.train.metrics import MetricsConfig
from statex_dist.train.profile import ProfileConfig
from statex_dist.train.validation import EvalConfig

MIN_SHARE = 8
"""Tokens of a sequence that a rank of a context group has at least: more than any convolution reaches back."""


@dataclass(kw_only=True)
class MixedSource:
    """One source of a mixture.

    Attributes:
        path: Directory or URL of shards.
        weight: Its share of the tokens, in any scale.
    """

    path: str
    weight: float = 1.0


@dataclass(kw_only=True)
class CurriculumStage:
    """What changes from a step on; what is not given stays as in ``data``.

    Attributes:
        from_step: First step of the stage.
        seq_len: Tokens of a packed sequence.
        weights: Share of the tokens by source; a source that is left out rests.
    """

    from_step: int
    seq_len: int | None = None
    weights: dict[str, float] | None = None


@dataclass(kw_only=True)
class DataSource:
    """The training data.

    Attributes:
        path: Directory of shards, as ``statex prepare`` makes it, or a URL (``s3://bucket/dir`` and so on).
        sources: Several of them by name, instead of ``path``.
        seq_len: Tokens of a packed sequence.
        packs_per_step: Packed sequences per optimizer step over all ranks; what one rank cannot hold at once becomes
            gradient accumulation.
        packing: ``best_fit`` (arXiv 2404.10830), ``concat`` (cut at the length) or ``one_document``.
        tail: ``pad``, or ``split`` (with ``best_fit``): cut a few documents so that nearly nothing is padded.
        window_tokens: Tokens within which documents are shuffled and packed together.
        long_documents: A document longer than a sequence goes on in the next: ``restart`` from an empty state, or
            ``carry`` the state over (no gradient through it).
        curriculum: Sequence lengths and weights over steps, in order.
        num_workers: Processes that build sequences; 0 builds them in a thread.
        skip_corrupt: Count the tokens of damaged shards and go on without them, instead of stopping.
        cache_dir: Where remote and compressed shards are kept; default ``~/.cache/statex``.
        cache_limit: Size that they may take there, for example ``500GB``.
        download_retries: Further attempts after a download that failed.
        download_timeout: Seconds without a new byte after which a download has failed.
        warn_epochs: A source that the run will see more often than this is named in a warning at the start.
    """

    path: str | None = None
    sources: dict[str, MixedSource] | None = None
    seq_len: int = 65536
    packs_per_step: int = 8
    packing: Literal["best_fit", "concat", "one_document"] = "best_fit"
    tail: Literal["pad", "split"] = "pad"
    window_tokens: int = 1 << 26
    long_documents: Literal["restart", "carry"] = "restart"
    curriculum: list[CurriculumStage] = field(default_factory=list)
    num_workers: int = 0
    skip_corrupt: bool = False
    cache_dir: str | None = None
    cache_limit: str | int | None = None
    download_retries: int = 4
    download_timeout: float = 60.0
    warn_epochs: float = 4.0

    def __post_init__(self) -> None:
        if (self.path is None) == (not self.sources):
            raise ConfigError("data: give either data.path (one source) or data.sources (a mixture)")
        if named := [name for name in self.sources or {} if holds_secret(name)]:
            raise ConfigError(f"data.sources: the name {named[0]} holds credentials, and names are shown; give a word")
        for name in ("seq_len", "packs_per_step", "window_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"data.{name} must be 1 or more, not {getattr(self, name)}")
        for name in ("num_workers", "download_retries"):
            if getattr(self, name) < 0:
                raise ConfigError(f"data.{name} must be 0 or more, not {getattr(self, name)}")
        if not 0 < self.download_timeout < math.inf:
            raise ConfigError(f"data.download_timeout must be a number of seconds above 0, not {self.download_timeout}")
        if not self.warn_epochs > 0:
            raise ConfigError(f"data.warn_epochs must be above 0 (.inf for no warning), not {self.warn_epochs}")
        self._tell_urls_apart()
        if self.cache_limit is not None:
            parse_size(str(self.cache_limit), option="data.cache_limit")

    def _tell_urls_apart(self) -> None:
        """Refuse two URLs that differ in what is taken for a secret alone: one dataset's files would serve both."""
        known: dict[str, tuple[str, str]] = {}
        for name, path in self.paths.items():
            other, url = known.setdefault(bare_url(path) if "://" in path else path, (name, path))
            if url != path:
                raise ConfigError(
                    f"data.sources.{other} and data.sources.{name} differ in the user, password, query or fragment of "
                    "their URL alone, which do not name a dataset; give them different paths"
                )

    @property
    def paths(self) -> dict[str, str]:
        """Where each source lies, by name."""
        if self.path is not None:
            return {ONLY_SOURCE: self.path}
        assert self.sources is not None
        return {name: source.path for name, source in self.sources.items()}

    def stages(self) -> list[Stage]:
        """Return the curriculum; without one, a single stage."""
        weights = {name: source.weight for name, source in self.sources.items()} if self.sources else None
        stages = [Stage(seq_len=self.seq_len, weights=weights)]
        for given in self.curriculum:
            stage = Stage(
                from_step=given.from_step,
                seq_len=stages[-1].seq_len if given.seq_len is None else given.seq_len,
                weights=stages[-1].weights if given.weights is None else given.weights,
            )
            # A first stage from step 0 takes the place of what `data` itself says.
            stages = [stage] if given is self.curriculum[0] and given.from_step == 0 else [*stages, stage]
        return stages


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
    data: DataSource
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
            ConfigError: The engine has one process, or the packs of a step do not divide.
        """
        if self.engine.name == "plain" and world_size > 1:
            raise ConfigError(f"engine.name plain runs in one process, not {world_size}; use engine.name zero3")
        self.accumulation_steps(world_size)

    def import_parts(self) -> None:
        """Import optimizer and schedule, which may be a user's.

        Raises:
            ConfigError: One cannot be imported.
        """
        _ = self.optimizer.factory, self.schedule.shape

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
