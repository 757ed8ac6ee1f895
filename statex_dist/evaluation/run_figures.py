"""The figures of ``statex report``: curves over the steps of training runs, as SVG."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_POINTS = 1000
"""Points of a curve; a longer one is drawn as the means of so many stretches of steps."""

_SIZE = (7.0, 4.2)
_MEAN_OF = 20


class Run(Protocol):
    """What is drawn of a run (:class:`statex_dist.evaluation.run_report.TrainingRun`)."""

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
class Figure:
    """A drawing and what it shows, in words."""

    svg: str
    text: str


@dataclass(frozen=True, slots=True)
class _Curve:
    """A quantity of a record that has one curve for each run.

    Attributes:
        key: Its name in a record.
        title: Of the figure.
        label: Of its axis, with the unit.
        scale: What the values are divided by.
        log: Whether the axis is logarithmic.
        noisy: Whether a running mean is drawn over the values.
    """

    key: str
    title: str
    label: str
    scale: float = 1.0
    log: bool = False
    noisy: bool = False


CURVES = (
    _Curve("loss", "Training loss", "loss (nats per token)", noisy=True),
    _Curve("lr", "Learning rate", "learning rate of the base"),
    _Curve("grad_norm", "Gradient norm before clipping", "global norm", log=True, noisy=True),
    _Curve("tokens_per_s", "Throughput", "tokens/s, all ranks"),
    _Curve("mfu", "Model FLOPs utilisation", "% of the peak", scale=0.01),
    _Curve("memory_bytes", "Peak memory of rank 0", "GiB", scale=float(1 << 30)),
    _Curve("skipped", "Skipped steps", "steps since the start"),
)

# From the bottom of the stack to its top.
_PHASES = ("forward", "backward", "step", "data", "save")


def draw_runs(runs: Sequence[Run]) -> Iterator[Figure]:
    """Yield every figure for which the runs have records, titles, labels and units on each."""
    for curve in CURVES:
        series = {run.name: _series(run.records, curve.key, scale=curve.scale) for run in runs}
        # A run that never skipped a step needs no figure to say so.
        if any(len(values) and (curve.key != "skipped" or values.any()) for _, values in series.values()):
            yield _draw_curve(curve, series)
    for run in runs:
        suffix = f": {run.name}" if len(runs) > 1 else ""
        if any("time" in record for record in run.records):
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
    axes = _axes(curve.title, curve.label)
    texts = []
    for name, (steps, values) in series.items():
        if not len(steps):
            continue
        smooth = curve.noisy and len(steps) >= 2 * _MEAN_OF
        (line,) = axes.plot(
            steps,
            values,
            label=None if smooth else name,
            linewidth=0.6 if smooth else 1.2,
            alpha=0.35 if smooth else 1.0,
            marker="." if len(steps) == 1 else None,
        )
        if smooth:
            means = np.convolve(values, np.full(_MEAN_OF, 1 / _MEAN_OF), mode="valid")
            axes.plot(steps[_MEAN_OF - 1 :], means, label=name, linewidth=1.4, color=line.get_color())
        texts.append(f"{name} from {values[0]:.4g} to {values[-1]:.4g}")
    if curve.log:
        axes.set_yscale("log")
    if len(series) > 1:
        axes.legend(fontsize="small")
    return _figure(axes, f"{curve.title} over steps; {', '.join(texts)} ({curve.label})")


def _draw_times(run: Run, suffix: str) -> Figure:
    """Stack what a step spends its time on; ``other`` is what no phase claims."""
    axes = _axes(f"Time of a step{suffix}", "seconds")
    timed = [record for record in run.records if record.get("time")]
    names = [*(p for p in _PHASES if p in timed[0]["time"]), *(p for p in timed[0]["time"] if p not in _PHASES)]
    steps = np.array([record["step"] for record in timed], dtype=np.float64)
    rows = [np.array([record["time"].get(name, 0.0) for record in timed]) for name in names]
    total = np.array([record["seconds"] for record in timed])
    rows.append(np.clip(total - sum(rows), 0, None))
    names.append("other")
    thinned = [_thinned(steps, row) for row in rows]
    heights = [values for _, values in thinned]
    if len(thinned[0][0]) == 1:
        axes.bar(names, [float(values[0]) for values in heights])
        axes.set_xlabel("phase of the only step")
    else:
        axes.stackplot(thinned[0][0], heights, labels=names, alpha=0.85)
        # The first step compiles and allocates: it would flatten all the others.
        axes.set_ylim(0, 1.3 * float(np.quantile(sum(heights), 0.98)))
        axes.legend(loc="upper right", fontsize="small", ncols=3)
    shares = [f"{name} {row.sum() / max(total.sum(), 1e-9):.1%}" for name, row in zip(names, rows, strict=True)]
    return _figure(axes, f"Time of a step{suffix}, stacked by phase; {', '.join(shares)} of all time")


def _draw_groups(run: Run, groups: Sequence[str], suffix: str) -> Figure:
    title = f"Gradient norm by parameter group{suffix}"
    axes = _axes(title, "norm before clipping")
    for group in groups:
        axes.plot(*_series(run.records, "grad_norms", group), label=group, linewidth=1.2)
    axes.set_yscale("log")
    axes.legend(fontsize="small", ncols=2)
    return _figure(axes, f"{title} over steps, groups {', '.join(groups)}")


def _draw_states(run: Run, layers: Sequence[str], suffix: str) -> Figure:
    """Draw each layer's state; where the plan is known, the expanded layers stand out."""
    from matplotlib import colormaps

    title = f"Size of the recurrent states{suffix}"
    axes = _axes(title, "root mean square of a layer's state")
    expanded = {str(layer) for layer in run.expanded}
    for layer in layers:
        steps, values = _series(run.records, "state_norms", layer)
        marker = "." if len(steps) < 30 else None
        if expanded and layer not in expanded:
            axes.plot(steps, values, color="0.75", linewidth=0.8, zorder=1)
        else:
            label = f"layer {layer}, expanded" if expanded else f"layer {layer}"
            colour = None if expanded else colormaps["viridis"](0.95 * int(layer) / len(layers))
            axes.plot(steps, values, label=label, linewidth=1.2, marker=marker, color=colour)
    if expanded and len(expanded) < len(layers):
        axes.plot([], [], color="0.75", linewidth=0.8, label="other layers")
    axes.set_yscale("log")
    axes.legend(fontsize="x-small", ncols=4)
    which = f"expanded layers {', '.join(sorted(expanded, key=int))} in colour" if expanded else f"{len(layers)} layers"
    return _figure(axes, f"{title} over steps, {which}")


def _axes(title: str, label: str) -> Axes:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=_SIZE, layout="constrained")
    FigureCanvasSVG(canvas)
    axes = canvas.subplots()
    axes.set_title(title)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    return axes


def _figure(axes: Axes, text: str) -> Figure:
    import matplotlib

    buffer = io.StringIO()
    canvas = axes.get_figure(root=True)
    assert canvas is not None
    # The same records give the same bytes; text stays text.
    with matplotlib.rc_context({"svg.hashsalt": "statex", "svg.fonttype": "none"}):
        canvas.savefig(buffer, format="svg", metadata={"Date": None})
    return Figure(svg=buffer.getvalue(), text=text)
