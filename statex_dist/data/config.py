"""The ``data`` section of a run's configuration, which builds the run's stores and loader."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from statex_dist.config import parse_size
from statex_dist.data.forecast import TrainedLength
from statex_dist.data.formats import open_store
from statex_dist.data.loader import LoaderOptions, PackedLoader, StepShare
from statex_dist.data.mixture import Stage
from statex_dist.data.packing.registry import find_packing
from statex_dist.data.plan import PackPlanOptions
from statex_dist.data.store import ShardStore
from statex_dist.errors import ConfigError
from statex_dist.redact import bare_url, holds_secret

ONLY_SOURCE = "data"
"""Name of the source where there is one alone."""


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
class DataConfig:
    """The training data.

    Attributes:
        path: Directory of shards, as ``statex prepare`` makes it, or a URL (``s3://bucket/dir`` and so on).
        sources: Several of them by name, instead of ``path``.
        seq_len: Tokens of a packed sequence.
        packs_per_step: Packed sequences per optimizer step over all ranks, at least one for each; what one rank
            cannot hold at once becomes gradient accumulation. It need not be a multiple of the number of ranks.
        packing: ``best_fit`` (arXiv 2404.10830), ``concat`` (cut at the length), ``one_document``, or one of your own
            (:mod:`statex_dist.data.packing.registry`).
        tail: ``pad``, or ``split`` (with ``best_fit``): cut a few documents so that nearly nothing is padded.
        window_tokens: Tokens within which documents are shuffled and packed together.
        long_documents: A document longer than a sequence continues in the next: ``restart`` from an empty state, or
            ``carry`` the state over (no gradient through it).
        curriculum: Sequence lengths and weights over steps, in order.
        num_workers: Processes that build sequences; 0 builds them in a thread.
        skip_corrupt: Count the tokens of damaged shards and continue without them, instead of stopping.
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
    packing: str = "best_fit"
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
        find_packing(self.packing, self.tail, section="data.")
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

    def open_stores(self, paths: Mapping[str, str] | None = None) -> dict[str, ShardStore]:
        """Open every source of the data, by name; or others in the same way.

        Raises:
            ConfigError: A URL or the cache's limit is wrong.
            DataError: A source is missing or damaged.
        """
        limit = None if self.cache_limit is None else parse_size(str(self.cache_limit), option="data.cache_limit")
        return {
            name: open_store(
                path,
                cache_dir=self.cache_dir,
                cache_limit=limit,
                download_retries=self.download_retries,
                download_timeout=self.download_timeout,
            )
            for name, path in (self.paths if paths is None else paths).items()
        }

    def build(
        self,
        stores: Mapping[str, ShardStore],
        *,
        vocab_size: int,
        pad_id: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> PackedLoader:
        """Return the loader of a rank.

        Args:
            stores: What :meth:`open_stores` returned.
            vocab_size: Number of ids that the model knows.
            pad_id: Id of padding.
            seed: Seed of the shuffles.
            rank: This rank, of those that share the steps (data-parallel ranks).
            world_size: Their number.

        Raises:
            ConfigError: There are more ranks than packs of a step.
        """
        return PackedLoader(
            stores,
            self.stages(),
            StepShare(global_packs=self.packs_per_step, rank=rank, world_size=world_size),
            LoaderOptions(
                pad_id=pad_id, vocab_size=vocab_size, num_workers=self.num_workers, skip_corrupt=self.skip_corrupt
            ),
            PackPlanOptions(
                seed=seed,
                packing=self.packing,
                tail=self.tail,
                window_tokens=self.window_tokens,
                long_documents=self.long_documents,
            ),
        )

    def trained_length(self, stores: Mapping[str, ShardStore]) -> TrainedLength:
        """Return the longest text that a run reads without emptying its state, by steps."""
        return TrainedLength.of(self.stages(), stores, carry=self.long_documents == "carry")
