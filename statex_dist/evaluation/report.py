"""What all suites share: checks of settings, intervals, crash-safe result files and plots."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from statex_dist.durable.files import write_durably, write_json
from statex_dist.errors import ConfigError


def check_reading(settings: Any, *counts: str) -> None:
    """Raise unless the settings that all suites have make sense: ``batch_size``, ``segment_length`` and ``seed``.

    Args:
        settings: A suite's settings.
        counts: Further fields that must be 1 or more.

    Raises:
        ConfigError: One does not.
    """
    for name in (*counts, "batch_size"):
        if getattr(settings, name) < 1:
            raise ConfigError(f"{name} must be 1 or more, not {getattr(settings, name)}")
    if settings.segment_length < 1:
        raise ConfigError(f"segment length must be 1 or more, not {settings.segment_length}")
    if settings.seed < 0:
        raise ConfigError(f"seed must be 0 or more, not {settings.seed}")


def check_different(name: str, numbers: Sequence[int], *, least: int = 1) -> None:
    """Raise unless ``numbers``, called ``name``, are one or more different numbers of ``least`` or more.

    Raises:
        ConfigError: They are not.
    """
    if not numbers or min(numbers) < least or len(set(numbers)) != len(numbers):
        raise ConfigError(f"{name} must be different numbers of {least} or more, not {list(numbers)}")


RESULT_VERSION = 2
"""Version of the JSON files' layout."""

_RESAMPLES = 2000
_DRAWS_AT_ONCE = 1 << 22
_LINE, _BAND, _REFERENCE = "#1f5fa8", "#1f5fa833", "#777777"


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A mean over samples with its bootstrap interval.

    Attributes:
        mean: The (weighted) mean.
        low: 2.5 % quantile of the resampled means; None where fewer than two samples cannot say how they differ.
        high: 97.5 % quantile; None together with ``low``.
        samples: Number of samples.
    """

    mean: float
    low: float | None
    high: float | None
    samples: int

    def to_dict(self, name: str = "accuracy") -> dict[str, Any]:
        """Return the JSON form, the mean under ``name``."""
        return {name: self.mean, "low": self.low, "high": self.high, "samples": self.samples}


def bootstrap(values: npt.ArrayLike, *, weights: npt.ArrayLike | None = None, seed: int = 0) -> Estimate:
    """Return a mean with its 95 % percentile bootstrap interval (Efron and Tibshirani 1993, chapter 13).

    Samples are drawn with replacement, a sample together with its weight. Where all values are equal (every answer
    right, or every one wrong) the interval is a single point, and says nothing about rarer outcomes: with ``n``
    samples, a rate below about ``3 / n`` may have gone unseen. A single sample (of any weight) has no interval.

    Args:
        values: ``[S]``, one number a sample.
        weights: ``[S]`` non-negative weights; None for equal ones.
        seed: Seed of the resampling.
    """
    x = np.asarray(values, dtype=np.float64)
    w = np.ones_like(x) if weights is None else np.asarray(weights, dtype=np.float64)
    assert x.ndim == 1, "one number a sample"
    assert x.shape == w.shape
    assert w.sum() > 0
    mean = float((x * w).sum() / w.sum())
    if np.count_nonzero(w) < 2:
        return Estimate(mean=mean, low=None, high=None, samples=len(x))
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, len(x)))))
    means: list[npt.NDArray[np.float64]] = []
    remaining, block = _RESAMPLES, max(1, _DRAWS_AT_ONCE // len(x))
    while remaining:
        rows = min(block, remaining)
        drawn = rng.integers(len(x), size=(rows, len(x)))
        # A draw of weightless samples only has no mean; it says as much as the whole.
        total = w[drawn].sum(axis=1)
        usable = total > 0
        means.append((x[drawn] * w[drawn]).sum(axis=1)[usable] / total[usable])
        remaining -= rows
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return Estimate(mean=mean, low=float(low), high=float(high), samples=len(x))


def open_target(directory: Path, *, overwrite: bool) -> None:
    """Make a result directory.

    With ``overwrite`` only the files of the same name are replaced; whatever else the directory holds stays.

    Raises:
        ConfigError: It is a file, or is not empty and ``overwrite`` is false.
    """
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"--out {directory} is a file; give a directory")
    if directory.is_dir() and any(directory.iterdir()) and not overwrite:
        raise ConfigError(f"--out {directory} exists and is not empty; pass --overwrite to replace its results")
    directory.mkdir(parents=True, exist_ok=True)


def write_results(
    directory: Path,
    suite: str,
    found: Mapping[str, Any],
    rows: Iterable[Mapping[str, Any]],
    plots: Mapping[str, bytes],
) -> list[Path]:
    """Write a suite's files so that a summary always belongs to the samples and plots beside it.

    Args:
        directory: An existing directory.
        suite: Stem of ``SUITE.json`` and ``SUITE.jsonl``.
        found: Contents of ``SUITE.json``, which is removed first and written last; its version and the names of the
            suite and the plots are added.
        rows: One record a sample.
        plots: PNG by file name.

    Returns:
        Paths of the written files, the summary first.
    """
    target = directory / f"{suite}.json"
    target.unlink(missing_ok=True)
    samples = directory / f"{suite}.jsonl"
    write_durably(samples, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))
    for name, content in plots.items():
        write_durably(directory / name, content)
    whole = {"version": RESULT_VERSION, "suite": suite, **found, "plots": list(plots)}
    write_json(target, whole, indent=2, ensure_ascii=False)
    return [target, samples, *(directory / name for name in plots)]


def plot_curve(
    x: Sequence[float],
    estimates: Sequence[Estimate],
    *,
    title: str,
    x_label: str,
    y_label: str,
    y_limits: tuple[float, float] | None = None,
    reference: tuple[Sequence[float], str] | None = None,
    tick_labels: Sequence[str] | None = None,
) -> bytes:
    """Return a PNG of estimates over a logarithmic axis, with their intervals as a band.

    Args:
        x: Positions on the axis, all above 0.
        estimates: What to draw, in the order of ``x``.
        title: Heading.
        x_label: Name of the x axis.
        y_label: Name of the y axis.
        y_limits: Range of the y axis; None lets the data decide.
        reference: A second curve, one value for each of ``x``, and its name, such as the level of guessing.
        tick_labels: Names of the positions; None writes the numbers.
    """
    figure, (axes,) = panels([title], title_size=11)
    axes.set_xscale("log", base=2)
    # None turns into NaN: an estimate without an interval leaves a gap in the band.
    low, high = (np.array([getattr(e, end) for e in estimates], np.float64) for end in ("low", "high"))
    axes.fill_between(x, low, high, color=_BAND, linewidth=0)
    axes.plot(x, [e.mean for e in estimates], color=_LINE, marker="o", markersize=5, linewidth=2)
    if reference is not None:
        axes.plot(x, reference[0], color=_REFERENCE, linestyle=":", linewidth=1.2, label=reference[1])
        axes.legend(frameon=False, loc="best")
    axes.set_xticks(x, tick_labels or [f"{value:g}" for value in x], rotation=30 if tick_labels else 0)
    axes.minorticks_off()
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set(xlabel=x_label, ylabel=y_label)
    if y_limits is not None:
        axes.set_ylim(*y_limits)
    return png(figure)


def plot_heat_map(
    values: npt.ArrayLike, *, columns: Sequence[str], rows: Sequence[str], title: str, x_label: str, y_label: str
) -> bytes:
    """Return a PNG of accuracies, each cell with its number.

    Args:
        values: ``[rows, columns]`` accuracies in 0..1.
        columns: Names along the x axis.
        rows: Names along the y axis, from the top.
        title: Heading.
        x_label: Name of the x axis.
        y_label: Name of the y axis.
    """
    grid = np.asarray(values, dtype=np.float64)
    figure, (axes,) = panels([title], title_size=11)
    image = axes.imshow(grid, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    for row, column in np.ndindex(*grid.shape):
        value = grid[row, column]
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", color="black" if value > 0.6 else "white")
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    figure.colorbar(image, ax=axes, label="accuracy", pad=0.02)
    return png(figure)


def panels(titles: Sequence[str], *, title_size: float = 10) -> tuple[Any, list[Any]]:
    """Return a figure with a panel for each title, side by side, and the panels."""
    # A figure of its own canvas: pyplot would keep it alive in global state and could ask for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.2 + 4.2 * len(titles), 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(np.atleast_1d(figure.subplots(1, len(titles))))
    for panel, title in zip(axes, titles, strict=True):
        panel.set_title(title, fontsize=title_size)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, axes


def png(figure: Any) -> bytes:
    """Return a figure's PNG."""
    buffer = io.BytesIO()
    # Without the library's version in it, the same numbers give the same file.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
