"""The figures of state health in ``statex report``: loss and states by position, capacity, and the fitted laws."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from statex_dist.evaluation.page.figures import (
    ALARM,
    FAINT,
    Figure,
    add_legend,
    finish,
    length_ticks,
    logarithmic_if_wide,
    look_of,
    new_axes,
    shade,
    styled,
)
from statex_dist.evaluation.page.suite_figures import Series, draw_curves
from statex_dist.evaluation.suites.base import Result, short_number

_DRAWN_HEADS = 40
_NAMED_LAYERS = 6
_READABLE_BASE = 1e6
_QUANTITIES = {"norm": "Norm of the states", "variance": "Variance of the states"}


def numbers(values: Sequence[float | None]) -> npt.NDArray[np.float64]:
    """Return values with NaN for null."""
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def collapse_figures(results: Sequence[Result], looks: Mapping[str, int]) -> Iterator[Figure]:
    """Yield for each prompt the loss by position, the models in one drawing, and each model's states by position."""
    prompts = dict.fromkeys(prompt for result in results for prompt in result.summary["prompts"])
    several = len({result.model for result in results}) > 1
    for prompt in prompts:
        found = [result for result in results if prompt in result.summary["prompts"]]
        yield _losses(prompt, found, looks)
        for result in found:
            heads = [head for head in result.samples("head") if head["prompt"] == prompt]
            for quantity in _QUANTITIES if heads else ():
                yield _heads(quantity, prompt, result, heads, several=several)


def _losses(prompt: str, results: Sequence[Result], looks: Mapping[str, int]) -> Figure:
    series = []
    for result in results:
        told = result.summary["prompts"][prompt]
        buckets, position = told["loss"]["by_position"], told["verdict"]["position"]
        series.append(
            Series(
                name=result.model,
                look=looks[result.model],
                x=[bucket["end"] for bucket in buckets],
                y=numbers([bucket["loss"] for bucket in buckets]).tolist(),
                low=numbers([bucket["low"] for bucket in buckets]).tolist(),
                high=numbers([bucket["high"] for bucket in buckets]).tolist(),
                marks=[position] if told["verdict"]["collapsed"] and position is not None else (),
            )
        )
    lengths = sorted({result.summary["settings"]["train_length"] for result in results})
    return draw_curves(
        series,
        title=f"Loss on {prompt} (× collapse)" if any(one.marks for one in series) else f"Loss on {prompt}",
        x_label="position (tokens), up to",
        y_label="nats per token",
        accuracy=False,
        lines={f"training length, {short_number(length)}": length for length in lengths},
    )


def _heads(quantity: str, prompt: str, result: Result, heads: Sequence[Mapping[str, Any]], *, several: bool) -> Figure:
    """Draw each layer's median head, and the heads that collapse as lines of their own with a cross."""
    x = np.array(result.summary["positions"], dtype=np.float64)
    length = result.summary["settings"]["train_length"]
    layers = sorted({head["layer"] for head in heads})
    bad = [head for head in heads if head["collapsed"]]
    drawn = sorted(bad, key=lambda head: head["position"] or 0)[:_DRAWN_HEADS]
    shown = layers if len(layers) <= _NAMED_LAYERS else layers[:: -(-len(layers) // _NAMED_LAYERS)]
    title = f"{_QUANTITIES[quantity]} on {prompt}" + (f": {result.model}" if several else "")
    with styled():
        axes = new_axes(title, "position (tokens)", quantity, legend_rows=(len(shown) + 3) // 2 + 1)
        medians = {}
        for number, layer in enumerate(layers):
            of_layer = np.stack([numbers(head[quantity]) for head in heads if head["layer"] == layer])
            # A head that is no longer finite is above the median, not away.
            medians[layer] = np.median(np.where(np.isnan(of_layer), np.inf, of_layer), axis=0)
            few = len(layers) <= _NAMED_LAYERS
            colour = look_of(number).colour if few else shade(number, len(layers))
            label = f"layer {layer}, median head" if layer in shown else None
            line = look_of(number).line if few else "-"
            axes.plot(x, _positive(medians[layer]), color=colour, linestyle=line, linewidth=1.5, label=label)
        for number, head in enumerate(drawn):
            values = _positive(numbers(head[quantity]))
            label = f"{len(bad)} that collapse (×)" if number == 0 else None
            axes.plot(x, values, color=ALARM, linewidth=1.0, alpha=0.8, label=label)
            if head["position"] is not None and np.isfinite(values).any():
                at = float(np.interp(head["position"], x[np.isfinite(values)], values[np.isfinite(values)]))
                axes.plot([head["position"]], [at], marker="x", markersize=7, markeredgewidth=2, color=ALARM)
        logarithmic_if_wide(axes)
        axes.axvline(length, color=FAINT, linestyle="dashdot", label=f"training length, {short_number(length)}")
        length_ticks(axes, x.tolist())
        add_legend(axes, columns=2)
        ends = [f"layer {layer} from {medians[layer][0]:.3g} to {medians[layer][-1]:.3g}" for layer in shown]
        said = f"{len(bad)} of {len(heads)} heads collapse"
        if bad:
            first = drawn[0]
            said += f", the first in layer {first['layer']}, head {first['head']}, at {first['position']} tokens"
        return finish(axes, f"{title} by position, {said}; median heads: {', '.join(ends)}")


def _positive(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return what a logarithmic axis can show."""
    return np.where((values > 0) & np.isfinite(values), values, np.nan)


def capacity_figures(results: Sequence[Result], looks: Mapping[str, int]) -> Iterator[Figure]:
    """Yield passkey recall over length, with the accuracy that counts as kept."""
    fields = {"x": "length", "y": "accuracy", "low": "exact_low", "high": "exact_high"}
    series = [Series.of(result, looks, result.summary["ladder"], **fields) for result in results]
    x = sorted({position for one in series for position in one.x})
    levels = sorted({result.summary["settings"]["threshold"] for result in results})
    yield draw_curves(
        series,
        title="Passkey recall by length",
        x_label="context length (tokens)",
        y_label="accuracy",
        references={f"kept: {level:.0%} or more": ([x[0], x[-1]], [level, level]) for level in levels},
    )


def law_figures(results: Sequence[Result]) -> Iterator[Figure]:
    """Yield each fitted law with the points that it was fitted to."""
    for result in results:
        for law, title in (("forget", "Forget threshold"), ("recall", "Longest context recalled")):
            points = [p for p in result.summary[f"{law}_points"] if p["tokens"] is not None]
            if points:
                yield _law(title, result.summary[law], points)


def _law(title: str, fit: Mapping[str, Any] | None, points: Sequence[Mapping[str, Any]]) -> Figure:
    with styled():
        axes = new_axes(title, "state (million numbers)", "thousand (1024) tokens", legend_rows=2 + (fit is not None))
        for number, (used, label) in enumerate(((True, "measured"), (False, "measured, not used"))):
            chosen = [p for p in points if p["used"] == used]
            look = look_of(number)
            x = np.array([p["state_numbers"] / 1e6 for p in chosen])
            y, low, high = (
                np.array([p["tokens"] if p[k] is None else p[k] for p in chosen]) / 1024
                for k in ("tokens", "low", "high")
            )
            if len(x):
                error = np.clip([y - low, high - y], 0, None)
                style: Any = {"color": look.colour, "marker": look.marker, "linestyle": "none", "capsize": 3}
                axes.errorbar(x, y, yerr=error, label=label, **style)
        said = "no law was fitted"
        if fit is not None:
            grid = np.linspace(min(fit["state"]), max(fit["state"]), 100)
            p = fit["parameters"]
            if fit["form"] == "linear":
                curve, said = p["slope"] * grid + p["intercept"], f"T = {p['slope']:.3g} N + {p['intercept']:.3g}"
            else:
                curve = p["a"] * np.expm1(p["rate"] * grid) + p["c"]
                readable = fit["b"] is not None and fit["b"] < _READABLE_BASE
                base = f"{fit['b']:.3g}^N" if readable else f"exp({p['rate']:.3g} N)"
                said = f"T = {p['a']:.3g} ({base} - 1) + {p['c']:.3g}"
            axes.plot(grid, curve, color=look_of(2).colour, linestyle="--", linewidth=1.7, label=f"fit: {said}")
        add_legend(axes)
        measured = ", ".join(f"{p['tokens']} tokens at {p['state_numbers']:,} numbers" for p in points)
        return finish(axes, f"{title} over the size of the state: {measured}; {said}")
