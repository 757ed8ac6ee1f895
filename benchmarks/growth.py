"""Figures at several numbers of ranks, and the exponent with which each grows."""

from __future__ import annotations

import math
from collections.abc import Sequence

from benchmarks.measure import markdown

Row = tuple[str, int, float, str]
"""Name of a figure, number of ranks (or nodes), value and unit."""


def exponent(points: Sequence[tuple[int, float]]) -> float | None:
    """Return the least-squares slope of log value over log ranks; None of one point, or where a value is 0.

    Args:
        points: Ranks and value, at least one.
    """
    if len({ranks for ranks, _ in points}) < 2 or any(value <= 0 for _, value in points):
        return None
    xs, ys = ([math.log(number) for number in numbers] for numbers in zip(*points, strict=True))
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)


def lines_of(rows: Sequence[Row]) -> list[list[str]]:
    """Return a line of the table for each figure: its values by ranks, and its growth exponent."""
    figures: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for name, ranks, value, unit in rows:
        figures.setdefault((name, unit), []).append((ranks, value))
    lines = []
    for (name, unit), points in figures.items():
        growth = exponent(points)
        values = ", ".join(f"{ranks}: {value:,.4g}" for ranks, value in points)
        lines.append([name, values, unit, "" if growth is None else f"{growth:.2f}"])
    return lines


def growth_table(rows: Sequence[Row]) -> str:
    """Return the table of figures, in Markdown."""
    return markdown(["figure", "ranks: value", "unit", "exponent"], lines_of(rows))
