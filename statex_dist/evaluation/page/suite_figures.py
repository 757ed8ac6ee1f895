"""The figures of suites in ``statex report``: heat maps of recall, and curves of several models in one drawing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from statex_dist.evaluation.page.figures import (
    FAINT,
    INK,
    Figure,
    add_legend,
    cells_figure,
    finish,
    length_ticks,
    look_of,
    new_axes,
    styled,
)
from statex_dist.evaluation.suites.base import Result, short_number

NO_SHOT = 0.5
"""Where a logarithmic axis of shots has its 0."""

LEVELS = {
    "guessing": "a random value of the context",
    "eliminating": "the commonest value not yet answered",
}
"""Accuracies of a model that knows the context's values but not whose they are, by their names in ``mqar.json``."""

_ACCURACY = (-0.03, 1.03)
_DOTS_HEIGHT = 5.5
_Dot = tuple[str, float, float | None, float | None]


def _place(x: float) -> str:
    return "0" if x == NO_SHOT else short_number(x)


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """A curve with its interval.

    Attributes:
        name: In the legend.
        look: Number of its look (:func:`~statex_dist.evaluation.page.figures.look_of`).
        x: Positions.
        y: Values; NaN where there is none.
        low: Lower ends of the intervals; None or NaN where there is none, as of a single sample.
        high: Upper ends.
        marks: Positions that are crossed out, such as that of a collapse.
    """

    name: str
    look: int
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float | None]
    high: Sequence[float | None]
    marks: Sequence[float] = ()

    @classmethod
    def of(
        cls,
        result: Result,
        looks: Mapping[str, int],
        rows: Sequence[Mapping[str, Any]],
        *,
        x: str,
        y: str,
        low: str = "low",
        high: str = "high",
    ) -> Series:
        """Return the curve of a model's rows, by the names of their fields."""
        xs, ys, lows, highs = ([row[field] for row in rows] for field in (x, y, low, high))
        return cls(name=result.model, look=looks[result.model], x=xs, y=ys, low=lows, high=highs)

    def in_words(self) -> str:
        """Return its ends, its best and its worst, for those who do not see it."""
        known = [(x, y) for x, y in zip(self.x, self.y, strict=True) if np.isfinite(y)]
        if not known:
            return f"{self.name} without a value"
        (first, last), by_value = (known[0], known[-1]), sorted(known, key=lambda pair: pair[1])
        words = f"{self.name} from {first[1]:.3g} at {_place(first[0])} to {last[1]:.3g} at {_place(last[0])}"
        if len(known) > 2:
            low, high = by_value[0], by_value[-1]
            words += f" (lowest {low[1]:.3g} at {_place(low[0])}, highest {high[1]:.3g} at {_place(high[0])})"
        return words


def draw_curves(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    accuracy: bool = True,
    references: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
    lines: Mapping[str, float] | None = None,
) -> Figure:
    """Return curves over a logarithmic axis, their intervals as bands.

    Args:
        series: The curves.
        title: Heading.
        x_label: Name of the x axis.
        y_label: Name of the y axis.
        accuracy: Whether values are shares, drawn from 0 to 1.
        references: Dotted curves by name, such as the level of guessing: positions and values.
        lines: Vertical lines by name, such as the training length.
    """
    references, lines = references or {}, lines or {}
    rows = (len(series) if len(series) > 1 else 0) + len(references) + len(lines)
    with styled():
        axes = new_axes(title, x_label, y_label, legend_rows=rows)
        for one in series:
            look = look_of(one.look)
            x, y = np.asarray(one.x, np.float64), np.asarray(one.y, np.float64)
            low, high = np.asarray(one.low, np.float64), np.asarray(one.high, np.float64)
            axes.fill_between(x, low, high, color=look.colour, alpha=0.18, linewidth=0)
            axes.plot(
                x,
                y,
                color=look.colour,
                linestyle=look.line,
                marker=look.marker if len(x) <= 24 else None,
                markersize=5,
                linewidth=1.7,
                label=one.name if len(series) > 1 else None,
            )
            for mark in one.marks:
                at = float(np.interp(mark, x[np.isfinite(y)], y[np.isfinite(y)]))
                axes.plot([mark], [at], marker="X", markersize=12, color=look.colour, markeredgecolor=INK)
        for number, (name, (places, values)) in enumerate(references.items()):
            dots = (0, (1, 1.5 + 2 * number))
            axes.plot(places, values, color=FAINT, linestyle=dots, linewidth=1.4, label=name)
        for number, (name, line) in enumerate(lines.items()):
            style = ("dashdot", "dashed", "dotted")[number % 3]
            axes.axvline(line, color=FAINT, linestyle=style, linewidth=1.3, label=name)
        length_ticks(axes, sorted({x for one in series for x in one.x}), name=_place)
        if accuracy:
            axes.set_ylim(*_ACCURACY)
        if rows:
            add_legend(axes)
        said = "; ".join(one.in_words() for one in series)
        marked = [f"{one.name} marked at {_place(mark)}" for one in series for mark in one.marks]
        behind = [*marked, *(f"{name} at {_place(x)}" for name, x in lines.items()), *references]
        return finish(axes, f"{title}, {y_label} over {x_label}: {said}" + "".join(f"; {words}" for words in behind))


def recall_figures(results: Sequence[Result], looks: Mapping[str, int]) -> Iterator[Figure]:
    """Yield a heat map for each task and model, then accuracy by length, the models in one drawing."""
    tasks = list(dict.fromkeys(task for result in results for task in result.summary["tasks"]))
    several = len({result.model for result in results}) > 1
    for task in tasks:
        for result in (r for r in results if task in r.summary["tasks"]):
            yield _heat_map(task, result, several=several)
    if not several:
        yield from _recall_curves("Recall by length", [(r, task) for r in results for task in r.summary["tasks"]], None)
        return
    for task in tasks:
        pairs = [(r, task) for r in results if task in r.summary["tasks"]]
        yield from _recall_curves(f"{task} by length", pairs, looks)


def _heat_map(task: str, result: Result, *, several: bool) -> Figure:
    cells = {(c["length"], c["depth"]): c["accuracy"] for c in result.summary["tasks"][task]["cells"]}
    lengths, depths = sorted({n for n, _ in cells}), sorted({d for _, d in cells})
    title = f"{task}: {result.model}" if several else task
    best, worst = (pick(cells, key=lambda place: cells[place]) for pick in (max, min))

    def place(cell: tuple[int, float]) -> str:
        return f"{cells[cell]:.2f} at {short_number(cell[0])} tokens and depth {100 * cell[1]:.0f} %"

    mean = sum(cells.values()) / len(cells)
    return cells_figure(
        [[cells.get((length, depth), np.nan) for length in lengths] for depth in depths],
        columns=[short_number(length) for length in lengths],
        rows=[f"{100 * depth:.0f} %" for depth in depths],
        title=title,
        x_label="context length (tokens)",
        y_label="depth of the needle",
        text=f"{title}: accuracy by length and depth, mean {mean:.2f}; best {place(best)}, worst {place(worst)}",
    )


def _recall_curves(
    title: str, pairs: Sequence[tuple[Result, str]], looks: Mapping[str, int] | None
) -> Iterator[Figure]:
    series = []
    for number, (result, task) in enumerate(pairs):
        by_length = {int(length): e for length, e in result.summary["tasks"][task]["by_length"].items()}
        x = sorted(by_length)
        series.append(
            Series(
                name=task if looks is None else result.model,
                look=number if looks is None else looks[result.model],
                x=x,
                y=[by_length[n]["accuracy"] for n in x],
                low=[by_length[n]["low"] for n in x],
                high=[by_length[n]["high"] for n in x],
            )
        )
    if any(len(one.x) > 1 for one in series):
        yield draw_curves(series, title=title, x_label="context length (tokens)", y_label="accuracy")


def estimates(result: Result, key: str, looks: Mapping[str, int], *, least: float = 0) -> Series:
    """Return the accuracies under ``key`` of a summary, by the numbers that are their names.

    Args:
        result: The result.
        key: Such as ``by_num_pairs``.
        looks: The models' looks.
        least: What a smaller position is drawn at.
    """
    values = {int(name): estimate for name, estimate in result.summary[key].items()}
    x = sorted(values)
    return Series(
        name=result.model,
        look=looks[result.model],
        x=[max(n, least) for n in x],
        y=[values[n]["accuracy"] for n in x],
        low=[values[n]["low"] for n in x],
        high=[values[n]["high"] for n in x],
    )


def mqar_figures(results: Sequence[Result], looks: Mapping[str, int]) -> Iterator[Figure]:
    """Yield the capacity curve, with the accuracies that a model reaches without recall."""
    yield draw_curves(
        [estimates(result, "by_num_pairs", looks) for result in results],
        title="Associative recall",
        x_label="key-value pairs in the context",
        y_label="accuracy",
        references=dict(chain.from_iterable(_levels(results, key, name) for key, name in LEVELS.items())),
    )


def _levels(
    results: Sequence[Result], key: str, name: str
) -> Iterator[tuple[str, tuple[Sequence[float], Sequence[float]]]]:
    """Yield a level by number of pairs; where models were asked differently, one for each group with the same."""
    alike: dict[tuple[tuple[int, float], ...], list[str]] = {}
    for result in results:
        levels = tuple(sorted((int(n), e[key]) for n, e in result.summary["by_num_pairs"].items() if key in e))
        if levels:
            alike.setdefault(levels, []).append(result.model)
    for levels, models in alike.items():
        called = f"{name}: {', '.join(models)}" if len(alike) > 1 else name
        yield called, ([n for n, _ in levels], [level for _, level in levels])


def icl_figures(results: Sequence[Result], looks: Mapping[str, int]) -> Iterator[Figure]:
    """Yield accuracy by shots."""
    series = [estimates(result, "by_shots", looks, least=NO_SHOT) for result in results]
    x = sorted({position for one in series for position in one.x})
    levels = sorted({result.summary["chance"] for result in results})
    yield draw_curves(
        series,
        title="In-context classification",
        x_label="shots",
        y_label="accuracy",
        references={f"chance, {level:.3g}": ([x[0], x[-1]], [level, level]) for level in levels},
    )


def perplexity_figures(results: Sequence[Result], looks: Mapping[str, int]) -> Iterator[Figure]:
    """Yield loss by position."""
    yield draw_curves(
        [Series.of(result, looks, result.summary["by_position"], x="end", y="loss") for result in results],
        title="Loss by position",
        x_label="position in the text (tokens), up to",
        y_label="nats per token",
        accuracy=False,
    )


def lm_eval_figures(results: Sequence[Result], looks: Mapping[str, int]) -> Iterator[Figure]:
    """Yield the figures between 0 and 1 as dots with their intervals, a line for each task and metric.

    A figure without an interval is left to the table, unless it has none for want of a second sample.
    """
    found: dict[str, list[_Dot]] = {}
    for result in results:
        for f in result.summary["figures"]:
            known = f["low"] is not None or f["samples"] == 1
            if f["value"] is None or not 0 <= f["value"] <= 1 or not known or not f["higher_is_better"]:
                continue
            name = f"{f['task']} {f['metric']}" + ("" if f["filter"] == "none" else f" ({f['filter']})")
            found.setdefault(name, []).append((result.model, f["value"], f["low"], f["high"]))
    models = list(dict.fromkeys(model for entries in found.values() for model, *_ in entries))
    # A line for each model, and one between two tasks; two for the names.
    inches = max(0.17 * (len(models) + 1), 0.42)
    step = max(3, int(_DOTS_HEIGHT / inches))
    names = list(found)
    for start in range(0, len(names), step):
        which = f", {start // step + 1} of {-(-len(names) // step)}" if len(names) > step else ""
        part = {name: found[name] for name in names[start : start + step]}
        yield _dots(f"lm-eval{which}", part, models, looks, height=max(2.2, 1.2 + inches * len(part)))


def _dots(
    title: str,
    found: Mapping[str, Sequence[_Dot]],
    models: Sequence[str],
    looks: Mapping[str, int],
    *,
    height: float,
) -> Figure:
    legend = len(models) if len(models) > 1 else 0
    with styled():
        axes = new_axes(title, "value, with 95 % interval", "", legend_rows=legend, height=height)
        for number, model in enumerate(models):
            look = look_of(looks[model])
            rows = [(i, entry) for i, entries in enumerate(found.values()) for entry in entries if entry[0] == model]
            y = [i + (number - (len(models) - 1) / 2) * 0.7 / len(models) for i, _ in rows]
            values, low, high = (np.array([entry[k] for _, entry in rows], np.float64) for k in (1, 2, 3))
            axes.errorbar(
                values,
                y,
                xerr=np.clip([values - low, high - values], 0, None),
                color=look.colour,
                marker=look.marker,
                linestyle="none",
                capsize=3,
                label=model,
            )
        # The task stands above its metric, so that a long name takes less width from the figure.
        axes.set_yticks(range(len(found)), [name.replace(" ", "\n", 1) for name in found], fontsize=9)
        axes.set_ylim(len(found) - 0.5, -0.5)
        axes.set_xlim(*_ACCURACY)
        if legend:
            add_legend(axes)
        said = [f"{name}: {', '.join(f'{m} {v:.3f}' for m, v, _, _ in entries)}" for name, entries in found.items()]
        return finish(axes, f"{title}, values with 95 % intervals; {'; '.join(said)}")
