"""The figures of ``statex report``: curves over the steps of training runs, as SVG."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from statex_dist.evaluation.page.figures import (
    FAINT,
    Figure,
    add_legend,
    finish,
    logarithmic_if_wide,
    look_of,
    new_axes,
    shade,
    styled,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_POINTS = 1000
"""Points of a curve; a longer curve is drawn as means over this number of stretches of steps."""

_MEAN_OF = 20
_NAMED_LAYERS = 12
_HATCHES = ("", "///", "...", "\\\\\\", "xx", "++")


class Run(Protocol):
    """Facts of a run that figures show (:class:`statex_dist.evaluation.page.runs.TrainingRun`)."""

    @property
    def name(self) -> str:
        """What to call it."""

    @property
    def records(self) -> Sequence[Mapping[str, Any]]:
        """One a step."""

    @property
    def expanded(self) -> tuple[int, ...]:
        """Its expanded layers."""


@dataclass(frozen=True, slots=True)
class _Curve:
    """A quantity of a record that has one curve for each run.

    Attributes:
        key: Its name in a record.
        name: Its name in a nested figure of the record; empty where ``key`` is the figure itself.
        title: Of the figure.
        label: Of its axis, with the unit.
        scale: What the values are divided by.
        log: Whether the axis is logarithmic where the values are wide apart.
        noisy: Whether a running mean is drawn over the values.
    """

    key: str
    title: str
    label: str
    scale: float = 1.0
    log: bool = False
    noisy: bool = False
    name: str = ""


CURVES = (
    _Curve("loss", "Training loss", "loss (nats per token)", noisy=True),
    _Curve("eval", "Validation loss", "loss (nats per token)", name="loss"),
    _Curve("lr", "Learning rate", "learning rate of the base"),
    _Curve("grad_norm", "Gradient norm before clipping", "global norm", log=True, noisy=True),
    _Curve("tokens_per_s", "Throughput", "tokens/s, all ranks"),
    _Curve("mfu", "Model FLOPs utilisation", "% of the peak", scale=0.01),
    _Curve("memory_bytes", "Peak memory of rank 0", "GiB", scale=float(1 << 30)),
    _Curve("skipped", "Skipped steps", "steps since the start"),
)

# From the bottom of the stack to its top.
_PHASES = ("forward", "backward", "step", "data", "save", "eval")


def draw_runs(runs: Sequence[Run]) -> Iterator[Figure]:
    """Yield every figure for which the runs have records, titles, labels and units on each."""
    for curve in CURVES:
        series = {run.name: _series(run.records, curve.key, curve.name or None, scale=curve.scale) for run in runs}
        # A run that never skipped a step needs no figure to say so.
        if any(len(values) and (curve.key != "skipped" or values.any()) for _, values in series.values()):
            yield _draw_curve(curve, series)
    for run in runs:
        suffix = f": {run.name}" if len(runs) > 1 else ""
        if any(record.get("time") for record in run.records):
            yield _draw_times(run, suffix)
        if len(groups := _names(run.records, "grad_norms")) > 1:
            yield _draw_groups(run, groups, suffix)
        if layers := _names(run.records, "state_norms"):
            yield _draw_states(run, layers, suffix)


def _names(records: Sequence[Mapping[str, Any]], key: str) -> list[str]:
    """Return the names under which nested figures occur."""
    return list(dict.fromkeys(name for record in records for name in record.get(key) or ()))


def _series(
    records: Sequence[Mapping[str, Any]], key: str, name: str | None = None, *, scale: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Return steps and values of a quantity, at most :data:`MAX_POINTS`; steps without it are left out."""
    found = []
    for record in records:
        value = record.get(key)
        if name is not None:
            value = (value or {}).get(name)
        if value is not None:
            found.append((record["step"], value))
    if not found:
        return np.zeros(0), np.zeros(0)
    steps, values = np.array(found, dtype=np.float64).T
    return _thinned(steps, values / scale)


def _thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if len(steps) <= MAX_POINTS:
        return steps, values
    edges = np.linspace(0, len(steps), MAX_POINTS + 1).astype(int)
    sizes = np.diff(edges)
    return np.add.reduceat(steps, edges[:-1]) / sizes, np.add.reduceat(values, edges[:-1]) / sizes


def _draw_curve(curve: _Curve, series: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Figure:
    texts = []
    with styled():
        axes = _axes(curve.title, curve.label, legend_rows=len(series) if len(series) > 1 else 0)
        for number, (name, (steps, values)) in enumerate(series.items()):
            if not len(steps):
                continue
            look = look_of(number)
            smooth = curve.noisy and len(steps) >= 2 * _MEAN_OF
            axes.plot(
                steps,
                values,
                label=None if smooth else name,
                color=look.colour,
                linestyle="-" if smooth else look.line,
                linewidth=0.6 if smooth else 1.5,
                alpha=0.35 if smooth else 1.0,
                marker=look.marker if len(steps) == 1 else None,
            )
            if smooth:
                means = np.convolve(values, np.full(_MEAN_OF, 1 / _MEAN_OF), mode="valid")
                axes.plot(
                    steps[_MEAN_OF - 1 :], means, label=name, linewidth=1.6, color=look.colour, linestyle=look.line
                )
            texts.append(f"{name} from {values[0]:.4g} to {values[-1]:.4g}")
        if curve.log:
            logarithmic_if_wide(axes)
        if len(series) > 1:
            add_legend(axes)
        return finish(axes, f"{curve.title} over steps; {', '.join(texts)} ({curve.label})")


def _draw_times(run: Run, suffix: str) -> Figure:
    """Stack what a step spends its time on; ``other`` is what no phase claims."""
    timed = [record for record in run.records if record.get("time")]
    found = dict.fromkeys(phase for record in timed for phase in record["time"])
    names = [*(p for p in _PHASES if p in found), *(p for p in found if p not in _PHASES)]
    steps = np.array([record["step"] for record in timed], dtype=np.float64)
    rows = [np.array([record["time"].get(name, 0.0) for record in timed]) for name in names]
    total = np.array([record["seconds"] for record in timed])
    rows.append(np.clip(total - sum(rows), 0, None))
    names.append("other")
    thinned = [_thinned(steps, row) for row in rows]
    heights = [values for _, values in thinned]
    shares = [f"{name} {row.sum() / max(total.sum(), 1e-9):.1%}" for name, row in zip(names, rows, strict=True)]
    hatches = [_HATCHES[i % len(_HATCHES)] for i in range(len(names))]
    with styled():
        single = len(thinned[0][0]) == 1
        axes = _axes(f"Time of a step{suffix}", "seconds", legend_rows=0 if single else -(-len(names) // 3))
        colours = [look_of(i).colour for i in range(len(names))]
        if single:
            axes.bar(names, [float(values[0]) for values in heights], color=colours)
            axes.set_xlabel("phase of the only step")
        else:
            axes.stackplot(thinned[0][0], heights, labels=names, colors=colours, alpha=0.75, hatch=hatches)
            # The first step compiles and allocates: it would flatten all the others.
            axes.set_ylim(0, 1.3 * float(np.quantile(sum(heights), 0.98)))
            add_legend(axes, columns=3)
        return finish(axes, f"Time of a step{suffix}, stacked by phase; {', '.join(shares)} of all time")


def _draw_groups(run: Run, groups: Sequence[str], suffix: str) -> Figure:
    title = f"Gradient norm by parameter group{suffix}"
    texts = []
    with styled():
        axes = _axes(title, "norm before clipping", legend_rows=-(-len(groups) // 2))
        for number, group in enumerate(groups):
            look = look_of(number)
            steps, values = _series(run.records, "grad_norms", group)
            axes.plot(steps, values, label=group, linewidth=1.5, color=look.colour, linestyle=look.line)
            texts.append(f"{group} from {values[0]:.4g} to {values[-1]:.4g}")
        logarithmic_if_wide(axes)
        add_legend(axes, columns=2)
        return finish(axes, f"{title} over steps; {', '.join(texts)}")


def _draw_states(run: Run, layers: Sequence[str], suffix: str) -> Figure:
    """Draw each layer's state; where the plan is known, the expanded layers stand out."""
    title = f"Size of the recurrent states{suffix}"
    expanded = {str(layer) for layer in run.expanded}
    named = [layer for layer in layers if layer in expanded] if expanded else list(layers)
    # Of many layers a few tell which end of the colours is which.
    shown = set(named if len(named) <= _NAMED_LAYERS else named[:: -(-len(named) // _NAMED_LAYERS)])
    others = bool(expanded) and len(named) < len(layers)
    largest = {}
    with styled():
        axes = _axes(title, "root mean square of a layer's state", legend_rows=-(-(len(shown) + others) // 2))
        for layer in layers:
            steps, values = _series(run.records, "state_norms", layer)
            largest[layer] = values[-1]
            marker = "." if len(steps) < 30 else None
            if layer not in named:
                axes.plot(steps, values, color=FAINT, linewidth=0.8, alpha=0.6, zorder=1)
                continue
            number = named.index(layer)
            look = look_of(number)
            axes.plot(
                steps,
                values,
                label=(f"layer {layer}, expanded" if expanded else f"layer {layer}") if layer in shown else None,
                linewidth=1.5,
                marker=marker,
                linestyle=look.line,
                color=look.colour if len(named) <= _NAMED_LAYERS else shade(number, len(named)),
            )
        if others:
            axes.plot([], [], color=FAINT, linewidth=0.8, alpha=0.6, label="other layers")
        logarithmic_if_wide(axes)
        add_legend(axes, columns=2)
        which = (
            f"expanded layers {', '.join(sorted(expanded, key=int))} in colour" if expanded else f"{len(layers)} layers"
        )
        top = max(largest, key=lambda layer: largest[layer])
        return finish(axes, f"{title} over steps, {which}; at the end layer {top} is largest, {largest[top]:.4g}")


def _axes(title: str, label: str, *, legend_rows: int = 0) -> Axes:
    return new_axes(title, "optimizer step", label, legend_rows=legend_rows)
