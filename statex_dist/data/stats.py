"""Statistics of a dataset before training: its documents' lengths, and the cost of each packing.

They need the lengths alone, so no shard is opened, or downloaded, where the lengths are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from statex_dist.data.packing.registry import strategies
from statex_dist.data.plan import PackPlan, PackPlanOptions
from statex_dist.data.store import ShardStore
from statex_dist.data.window import PackReport
from statex_dist.errors import ConfigError, DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PERCENTILES = (5, 25, 50, 75, 90, 95, 99)
PLOT_SUFFIXES = (".png", ".svg")


class PackingMode(NamedTuple):
    """A way to pack, as :class:`~statex_dist.data.plan.PackPlan` takes it."""

    packing: str
    tail: str

    @property
    def title(self) -> str:
        """What to call it in a table."""
        return f"{self.packing}, tail split" if self.tail == "split" else self.packing


def packing_modes() -> list[PackingMode]:
    """Return every strategy with every way to fill tails that it takes."""
    return [PackingMode(strategy.name, tail) for strategy in strategies() for tail in strategy.tails]


@dataclass(frozen=True, slots=True)
class LengthBucket:
    """Documents of ``start <= n < stop`` tokens, the bounds powers of two."""

    start: int
    stop: int
    documents: int
    tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LengthStats:
    """How long documents are.

    Attributes:
        documents: Number of documents.
        tokens: Number of tokens.
        percentiles: Length by name, in order: ``min``, ``p5``, ..., ``p99``, ``max``; each is a length that occurs.
        mean: Mean length.
        buckets: The histogram, without the empty buckets at both ends.
    """

    documents: int
    tokens: int
    percentiles: dict[str, int]
    mean: float
    buckets: list[LengthBucket]


@dataclass(frozen=True, slots=True)
class PackingStats:
    """The cost of one packing at one length of packs.

    Attributes:
        mode: The packing.
        report: Its figures.
        long_documents: Documents longer than a pack, which any packing has to cut.
    """

    mode: PackingMode
    report: PackReport
    long_documents: int

    @property
    def cut_share(self) -> float:
        """Fraction of the documents that is cut."""
        return self.report.cut_documents / self.report.documents

    @property
    def long_share(self) -> float:
        """Fraction of the documents that any packing has to cut."""
        return self.long_documents / self.report.documents

    def to_dict(self) -> dict[str, Any]:
        """Return the figures, JSON-able."""
        return {
            "packing": self.mode.packing,
            "tail": self.mode.tail,
            **asdict(self.report),
            "long_documents": self.long_documents,
            "padding": self.report.waste,
            "cut_share": self.cut_share,
            "documents_per_pack": self.report.documents_per_pack,
        }


def length_stats(store: ShardStore) -> LengthStats:
    """Return how long the documents of ``store`` are.

    Raises:
        DataError: There is no document.
    """
    lengths = np.concatenate([np.zeros(0, np.int64), *(store.lengths(shard) for shard in range(store.num_shards))])
    if not len(lengths):
        raise DataError("the dataset holds no documents; prepare it from files with text in them")
    # An empty document has exponent 0, one of 2**(k - 1) <= n < 2**k tokens has exponent k.
    exponents = np.frexp(lengths.astype(np.float64))[1]
    documents = np.bincount(exponents)
    tokens = np.bincount(exponents, weights=lengths).astype(np.int64)
    values = np.percentile(lengths, (0, *PERCENTILES, 100), method="inverted_cdf").tolist()
    names = ("min", *(f"p{p}" for p in PERCENTILES), "max")
    return LengthStats(
        documents=len(lengths),
        tokens=int(lengths.sum()),
        percentiles={name: int(value) for name, value in zip(names, values, strict=True)},
        mean=float(lengths.mean()),
        buckets=[
            LengthBucket((1 << k) >> 1, 1 << k, int(documents[k]), int(tokens[k]))
            for k in range(int(exponents.min()), len(documents))
        ],
    )


def packing_stats(
    store: ShardStore, seq_lens: Sequence[int], *, windows: int = 1, window_tokens: int = 1 << 26, seed: int = 0
) -> list[PackingStats]:
    """Return what each packing costs at each of ``seq_lens``, over the first ``windows`` windows of an epoch.

    Raises:
        ConfigError: A value is out of its range.
        DataError: The store holds no tokens.
    """
    if windows < 1:
        raise ConfigError(f"windows is {windows}; it must be at least 1")
    plans = {
        mode: PackPlan(
            store, PackPlanOptions(seed=seed, window_tokens=window_tokens, packing=mode.packing, tail=mode.tail)
        )
        for mode in packing_modes()
    }
    first = next(iter(plans.values()))
    found = []
    for seq_len in seq_lens:
        if seq_len < 1:
            raise ConfigError(f"seq_len is {seq_len}; it must be at least 1")
        # Windows are the same whatever the packing.
        shards = [int(shard) for window in first.windows(0)[:windows] for shard in window]
        long = sum(int((store.lengths(shard) > seq_len).sum()) for shard in shards)
        for mode, plan in plans.items():
            found.append(PackingStats(mode, plan.report(seq_len, max_windows=windows), long))
    return found


def check_plot_path(path: Path) -> None:
    """Check that a plot can be written to ``path``.

    Raises:
        ConfigError: Its suffix is unknown or its directory does not exist.
    """
    if path.suffix.lower() not in PLOT_SUFFIXES:
        raise ConfigError(f"plot {path} has no known suffix; allowed: {', '.join(PLOT_SUFFIXES)}")
    if not path.parent.is_dir():
        raise ConfigError(f"plot {path}: directory {path.parent} does not exist; make it first")


def draw_stats(lengths: LengthStats, packings: Sequence[PackingStats], path: Path, *, title: str) -> None:
    """Draw the lengths by documents and by tokens, and each packing's padding and cuts, to ``path``.

    Raises:
        ConfigError: See :func:`check_plot_path`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    check_plot_path(path)
    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    axes = figure.subplots(2, 2)
    _draw_lengths(axes[0, 0], lengths, "documents", lengths.documents)
    _draw_lengths(axes[0, 1], lengths, "tokens", lengths.tokens)
    _draw_packings(axes[1, 0], packings, "padding (% of all positions)", [p.report.waste for p in packings])
    _draw_packings(axes[1, 1], packings, "cut documents (%)", [p.cut_share for p in packings])
    # A good packing pads a hundredth of a percent, one_document most of a pack: both should be seen.
    axes[1, 0].set_yscale("symlog", linthresh=0.1)
    axes[1, 0].margins(y=0.15)
    axes[1, 1].legend(fontsize="small")
    figure.savefig(path, dpi=150)


def _draw_lengths(axes: Axes, lengths: LengthStats, what: str, total: int) -> None:
    starts = np.array([bucket.start or 0.5 for bucket in lengths.buckets])
    shares = [100 * getattr(bucket, what) / max(total, 1) for bucket in lengths.buckets]
    axes.bar(starts, shares, width=starts, align="edge", edgecolor="white")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens of a document")
    axes.set_ylabel(f"% of {what}")
    axes.grid(axis="y", alpha=0.3)


def _draw_packings(axes: Axes, packings: Sequence[PackingStats], label: str, shares: Sequence[float]) -> None:
    seq_lens = list(dict.fromkeys(p.report.seq_len for p in packings))
    modes = list(dict.fromkeys(p.mode for p in packings))
    width = 0.8 / len(modes)
    for k, mode in enumerate(modes):
        values = [100 * share for p, share in zip(packings, shares, strict=True) if p.mode == mode]
        bars = axes.bar(np.arange(len(seq_lens)) + (k - (len(modes) - 1) / 2) * width, values, width, label=mode.title)
        axes.bar_label(bars, fmt="%.2f", fontsize=7)
    axes.set_xticks(range(len(seq_lens)), [f"{n:,}" for n in seq_lens])
    axes.set_xlabel("tokens of a pack")
    axes.set_ylabel(label)
    axes.grid(axis="y", alpha=0.3)
