"""Plots of state health: loss and states by position, and recall by length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from statex_dist.evaluation.health.collapse import CollapseSettings
from statex_dist.evaluation.health.verdict import Judged
from statex_dist.evaluation.report import panels, png
from statex_dist.state.laws import MILLION, THOUSAND_TOKENS, Law

_COLOURS = {"newlines": "#c2410c", "text": "#1f5fa8", "data": "#15803d"}
_COLLAPSED, _HEALTHY, _MARK, _GRID = "#b91c1c", "#8a93a0", "#444444", "#dddddd"
_LINE = "#1f5fa8"
_DRAWN_HEADS = 400


def _panels(titles: Sequence[str]) -> tuple[Any, list[Any]]:
    figure, axes = panels(titles)
    for panel in axes:
        panel.grid(axis="y", color=_GRID, linewidth=0.8)
    return figure, axes


def length_axis(axes: Any, label: str) -> None:
    """Give a panel a logarithmic x axis in tokens."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=9))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1024:g}K" if x >= 1024 else f"{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(label)


def plot_losses(judged: Mapping[str, Judged], settings: CollapseSettings) -> bytes:
    """Return a PNG of the loss by position, a line a prompt, with its interval where several sequences give one.

    A dot is where the model collapses.
    """
    figure, (axes,) = _panels(["Loss by position, past the training length"])
    positions = np.array(settings.positions)
    for prompt, (_, verdict, curve) in judged.items():
        colour = _COLOURS[prompt]
        if curve.low is not None and curve.high is not None:
            axes.fill_between(positions, curve.low, curve.high, color=colour, alpha=0.2, linewidth=0)
        axes.plot(positions, curve.mean, color=colour, linewidth=1.8, label=prompt)
        if verdict.position is None:
            continue
        at = float(curve.mean[settings.positions.index(verdict.position)])
        if np.isfinite(at):
            axes.plot([verdict.position], [at], "o", color=colour, markersize=7, markeredgecolor="white")
        else:
            axes.axvline(verdict.position, color=colour, linestyle="--", linewidth=1.2)
    _finish(axes, settings)
    axes.set(ylabel="nats per token")
    axes.legend(
        frameon=False, loc="best", title="o  collapse" if any(j[1].collapsed for j in judged.values()) else None
    )
    return png(figure)


def plot_norms(judged: Mapping[str, Judged], settings: CollapseSettings) -> bytes:
    """Return a PNG of the states' norms by position, a panel a prompt and a line a head (the 400 worst)."""
    titles = [
        f"{prompt}: {sum(head.collapsed for head in heads)} of {len(heads)} heads collapsed"
        for prompt, (heads, _, _) in judged.items()
    ]
    figure, all_axes = _panels(titles)
    positions = np.array(settings.positions)
    for axes, (heads, _, _) in zip(all_axes, judged.values(), strict=True):
        ordered = sorted(heads, key=lambda head: head.badness)[-_DRAWN_HEADS:]
        for head in ordered:
            colour = _COLLAPSED if head.collapsed else _HEALTHY
            values = np.where(head.series["norm"] > 0, head.series["norm"], np.nan)
            axes.plot(positions, values, color=colour, linewidth=1.1, alpha=0.8 if head.collapsed else 0.5)
            if head.why == "not finite" and head.position is not None:
                axes.axvline(head.position, color=colour, linestyle="--", linewidth=1.0)
        axes.set_yscale("log")
        _finish(axes, settings)
        axes.set(ylabel="norm of the state (red: collapsed)")
    return png(figure)


def _finish(axes: Any, settings: CollapseSettings) -> None:
    """Give a panel its position axis with the training length."""
    length_axis(axes, "position (tokens read)")
    axes.axvline(settings.train_length, color=_MARK, linestyle=":", linewidth=1.2)
    place = {"xycoords": ("data", "axes fraction"), "fontsize": 7, "color": _MARK}
    axes.annotate(" training length", (settings.train_length, 0.02), **place)


def plot_ladder(ladder: Sequence[Mapping[str, Any]], threshold: float) -> bytes:
    """Return a PNG of passkey recall by length with its exact interval; lengths that pass are filled."""
    figure, (axes,) = _panels(["Passkey recall by context length"])
    lengths = [rung["length"] for rung in ladder]
    low, high = ([rung[name] for rung in ladder] for name in ("exact_low", "exact_high"))
    axes.fill_between(lengths, low, high, color=_LINE, alpha=0.2, linewidth=0, label="exact 95 % interval")
    axes.plot(lengths, [rung["accuracy"] for rung in ladder], color=_LINE, linewidth=1.8)
    for rung in ladder:
        fill = _LINE if rung["passes"] else "white"
        axes.plot([rung["length"]], [rung["accuracy"]], "o", color=_LINE, markerfacecolor=fill, markersize=6)
    axes.axhline(threshold, color=_MARK, linestyle=":", linewidth=1.2, label=f"{100 * threshold:g} %")
    length_axis(axes, "context length (tokens)")
    axes.set(ylabel="share of right answers", ylim=(-0.03, 1.03))
    axes.legend(frameon=False, loc="best")
    return png(figure)


def plot_laws(laws: Mapping[str, tuple[Law | None, Sequence[Any]]]) -> bytes:
    """Return a PNG of lengths over state sizes, a panel a law: points, bounds, the fit and its prediction interval.

    Args:
        laws: By title the law (None where it was refused) and its :class:`~statex_dist.evaluation.health.laws.Point` s.
    """
    figure, all_axes = _panels(list(laws))
    for axes, (law, points) in zip(all_axes, laws.values(), strict=True):
        axes.set(xlabel="state (million numbers)", ylabel="length (K tokens)")
        for point in points:
            size = point.state_numbers / MILLION
            if point.used:
                axes.plot([size], [point.tokens / THOUSAND_TOKENS], "o", color=_LINE, markersize=6)
            if point.used and point.low is not None:
                axes.plot([size] * 2, [point.low / THOUSAND_TOKENS, point.tokens / THOUSAND_TOKENS], color=_LINE)
            if not point.used and point.low is not None:
                axes.plot([size], [point.low / THOUSAND_TOKENS], "^", color=_HEALTHY, markersize=6)
        if law is None:
            axes.text(0.5, 0.5, "not fitted", transform=axes.transAxes, ha="center", color=_MARK)
            continue
        x = np.linspace(min(law.state), max(law.state), 100)
        axes.plot(x, [law.at(value) for value in x], color=_COLLAPSED, linewidth=1.6, label=f"{law.form} fit")
        band = [law.interval(value) for value in x]
        if None not in band:
            low, high = np.array(band).T
            label = "95 % of one more model"
            axes.fill_between(x, low, high, color=_COLLAPSED, alpha=0.15, linewidth=0, label=label)
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, loc="upper left")
    return png(figure)
