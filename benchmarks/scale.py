"""What grows with ranks, nodes or tensors: every figure with its growth exponent, simulated and on 1-4 real ranks.

The parts are modules of their own: the start (real ranks), checkpoints (real classes on simulated ranks), lost nodes
(simulated hosts), the offline tools (real files of simulated ranks) and the view of the fleet (simulated ranks). The
growth exponent is the slope of the logarithm of a value over that of the ranks: 0 does not grow, 1 grows in proportion.
Run as ``python -m benchmarks.scale [--parts start checkpoints ...]``.
"""

from __future__ import annotations

import argparse
import importlib
import math
from collections.abc import Sequence

from benchmarks.measure import Record, heading, machine, markdown

PARTS = ("start", "checkpoints", "nodes", "tools", "fleet")

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


def main() -> None:
    """Print a table for each part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    options = parser.parse_args()
    print(heading(Record(machine(packages=("torch", "deepspeed"))).document()))
    for part in options.parts:
        rows = importlib.import_module(f"benchmarks.scale_{part}").measure()
        print(f"\n{part}\n")
        print(markdown(["figure", "ranks: value", "unit", "exponent"], lines_of(rows)), flush=True)


if __name__ == "__main__":
    main()
