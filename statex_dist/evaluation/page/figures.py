"""Common style and labels of all figures of ``statex report``, for light and dark schemes.

A figure is one SVG for both schemes. For each colour of :data:`ROLES` the SVG holds the name of the colour's role. The
SVG's own style sheet defines the roles under ``prefers-color-scheme``. The background is the page's. Series differ in
colour, line and marker, so that a reader need not distinguish them by colour alone.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from statex_dist.evaluation.suites.base import Figure, short_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROLES = {
    # role: (in light, in dark); the series are Okabe and Ito's colours, shaded until they stand out from either ground
    "ink": ("#1d1d21", "#ececf0"),
    "faint": ("#5f5f68", "#b4b4bf"),
    "grid": ("#dcdce2", "#3a3a42"),
    "alarm": ("#c2410d", "#ff8f5a"),
    "s0": ("#0a6fb0", "#5ab8ec"),
    "s1": ("#a35b02", "#f0b13c"),
    "s2": ("#0b7d5c", "#35c99b"),
    "s3": ("#a8487f", "#eb9fca"),
    "s4": ("#5b4fc4", "#aea5ff"),
    "s5": ("#7a6a0b", "#e2d556"),
    "s6": ("#51606b", "#a9bac6"),
}
INK, FAINT, GRID, ALARM = (ROLES[name][0] for name in ("ink", "faint", "grid", "alarm"))

_SERIES = tuple(light for role, (light, _) in ROLES.items() if role[0] == "s")
_LINES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)), (0, (7, 2)), (0, (3, 3)))
_MARKERS = "osD^vPX"
_SIZE = (5.2, 3.5)
_LEGEND_ROW = 0.21
_TITLE_WIDTH, _LEGEND_WIDTH = 46, 60
_DECADE = 10.0
_WIDE_CELLS, _MOST_TICKS = 8, 8
_RC: dict[Any, Any] = {
    "svg.hashsalt": "statex",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10.5,
    # A "$" in the name of a directory is a "$".
    "text.parse_math": False,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.formatter.useoffset": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.fontsize": 9.5,
    "legend.frameon": False,
}


@dataclass(frozen=True, slots=True)
class Look:
    """How a series is drawn."""

    colour: str
    line: Any
    marker: str


def look_of(number: int) -> Look:
    """Return the look of the ``number``-th series; colours repeat after seven, with other lines."""
    colours = len(_SERIES)
    return Look(
        colour=_SERIES[number % colours],
        line=_LINES[(number + number // colours) % len(_LINES)],
        marker=_MARKERS[(number + 2 * (number // colours)) % len(_MARKERS)],
    )


@contextmanager
def styled() -> Iterator[None]:
    """Draw in the report's style."""
    import matplotlib

    with matplotlib.rc_context(_RC):
        yield


def new_axes(title: str, x_label: str, y_label: str, *, legend_rows: int = 0, height: float | None = None) -> Axes:
    """Return the axes of a new figure, to be used inside :func:`styled`.

    Args:
        title: Heading.
        x_label: Name of the x axis.
        y_label: Name of the y axis, with its unit.
        legend_rows: Rows of a legend below the axes, for which the figure grows.
        height: In inches, without the legend; None for that of all others.
    """
    from matplotlib.figure import Figure as Canvas

    # A figure of its own canvas: pyplot would keep it alive in global state and could ask for a display.
    lines = textwrap.wrap(title, _TITLE_WIDTH)
    inches = (height or _SIZE[1]) + _LEGEND_ROW * (legend_rows + len(lines) - 1)
    canvas = Canvas(figsize=(_SIZE[0], inches), layout="constrained")
    axes = canvas.subplots()
    axes.set_title("\n".join(lines), pad=9)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_axisbelow(True)
    axes.grid(color=GRID, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def add_legend(axes: Axes, *, columns: int = 1) -> None:
    """Put the legend below the axes, where it hides nothing."""
    canvas = axes.get_figure(root=True)
    assert canvas is not None
    most = _LEGEND_WIDTH // columns
    for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
        handle.set_label(label if len(label) <= most else f"{label[: most // 2 - 1]} … {label[-most // 2 + 2 :]}")
    canvas.legend(loc="outside lower left", ncols=columns, handlelength=3.2)


def shade(number: int, count: int) -> Any:
    """Return the colour of one of many ordered things: of viridis, what stands out from light and dark alike."""
    from matplotlib import colormaps

    return colormaps["viridis"](0.35 + 0.5 * number / max(1, count - 1))


def logarithmic_if_wide(axes: Axes) -> None:
    """Make the y axis logarithmic where what is drawn spans a decade: within less it would have no tick to read."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    drawn = [np.asarray(line.get_ydata(), dtype=np.float64) for line in axes.get_lines()]
    values = np.concatenate([y[np.isfinite(y) & (y > 0)] for y in drawn] or [np.ones(1)])
    if len(values) and values.max() >= _DECADE * values.min():
        axes.set_yscale("log")
        few = values.max() < _DECADE**2.5 * values.min()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())


def length_ticks(axes: Axes, positions: Sequence[float], *, name: Callable[[float], str] | None = None) -> None:
    """Give the x axis a logarithmic scale with ticks at the positions, at powers of two where they are many.

    Args:
        axes: The axes.
        positions: Where something is drawn.
        name: What a position is called; None for :func:`short_number`.
    """
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log", base=2)
    candidates = sorted(set(positions), reverse=True)
    low, high = np.log2(candidates[-1]), np.log2(candidates[0])
    if len(candidates) > _MOST_TICKS:
        candidates = [float(2**power) for power in range(int(high), int(np.ceil(low)) - 1, -1)]
    kept: list[float] = []
    for position in candidates:
        # The largest is kept, and no two stand closer than their names are wide.
        if not kept or np.log2(kept[-1] / position) > 0.99 * (high - low) / _MOST_TICKS:
            kept.append(position)
    axes.set_xticks(kept, [(name or short_number)(value) for value in kept])
    axes.xaxis.set_minor_locator(NullLocator())


def cells_figure(
    values: npt.ArrayLike,
    *,
    columns: Sequence[str],
    rows: Sequence[str],
    title: str,
    x_label: str,
    y_label: str,
    text: str,
) -> Figure:
    """Return a heat map of accuracies, each cell with its number.

    Args:
        values: ``[rows, columns]`` accuracies in 0..1; NaN leaves a cell empty.
        columns: Names along the x axis.
        rows: Names along the y axis, from the top.
        title: Heading.
        x_label: Name of the x axis.
        y_label: Name of the y axis.
        text: What is seen.
    """
    grid = np.asarray(values, dtype=np.float64)
    with styled():
        axes = new_axes(title, x_label, y_label, height=max(2.2, 1.1 + 0.27 * len(rows)))
        axes.grid(visible=False)
        # Cells are rectangles: an image in the drawing would be blurred.
        axes.pcolormesh(np.ma.masked_invalid(grid), cmap="viridis", vmin=0, vmax=1, edgecolors="face", linewidth=0.3)
        axes.invert_yaxis()
        many = len(columns) > _WIDE_CELLS
        axes.set_xticks(np.arange(len(columns)) + 0.5, columns, fontsize=8.5 if many else None)
        axes.set_yticks(np.arange(len(rows)) + 0.5, rows)
        for row, column in np.ndindex(*grid.shape):
            value = grid[row, column]
            if np.isfinite(value):
                place, colour = (column + 0.5, row + 0.5), "#000000" if value > 0.6 else "#ffffff"
                # Where cells are narrow the point says enough.
                words = f"{value:.2f}".replace("0.", ".").replace("1.00", "1") if many else f"{value:.2f}"
                axes.text(*place, words, ha="center", va="center", color=colour, fontsize=9.5)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        return finish(axes, text)


def finish(axes: Axes, text: str) -> Figure:
    """Return the axes' figure, to be used inside :func:`styled`: the same drawing gives the same bytes."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    canvas = axes.get_figure(root=True)
    assert canvas is not None
    for ground in (canvas.patch, axes.patch):
        ground.set_facecolor("none")
    # The canvas's own writer: `savefig` draws everything once more beforehand, for the layout that a drawing makes.
    FigureCanvasSVG(canvas).print_svg(buffer, metadata={"Date": None})
    return Figure(svg=_themed(buffer.getvalue()), text=text)


def _themed(svg: str) -> str:
    """Replace colours by the names of their roles, and add the style sheet that defines the roles."""
    for role, (light, _) in ROLES.items():
        svg = svg.replace(light, f"var(--{role})")
    light, dark = (_sheet({role: pair[i] for role, pair in ROLES.items()}) for i in (0, 1))
    sheet = f"{light} @media (prefers-color-scheme: dark) {{ {dark} }}"
    opening = '<style type="text/css">'
    assert opening in svg, "matplotlib writes a style sheet"
    return svg.replace(opening, f"{opening}{sheet} ", 1)


def _sheet(colours: Mapping[str, str]) -> str:
    return f":root {{ {' '.join(f'--{role}: {colour};' for role, colour in colours.items())} }}"
