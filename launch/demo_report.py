"""The demo's table and plot."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.table import Table

ARMS = {"base": "pre-trained", "lpt": "post-trained as it is (LPT)", "statex": "expanded, then post-trained (StateX)"}
NUM_PAIRS = (8, 16, 32, 64)


def make_table(result: dict[str, Any]) -> Table:
    """Return the demo's table: a row an arm, means over seeds with their spread (standard deviation)."""
    seeds = len(result["arms"]["base"]["seeds"])
    title = f"{result['family']}: recall by number of key-value pairs ({seeds} seed{'s' if seeds > 1 else ''})"
    table = Table(title=title)
    table.add_column("model")
    for column in ("state", "parameters", *(f"{n} pairs" for n in NUM_PAIRS), "text ppl", "train tok/s"):
        table.add_column(column, justify="right")
    for arm, text in ARMS.items():
        entry = result["arms"][arm]
        records = entry["seeds"]
        table.add_row(
            text,
            f"{entry['state_numbers']:,}",
            f"{entry['parameters']:,}",
            *(_spread((r["recall"][str(n)] for r in records), "{:.3f}") for n in NUM_PAIRS),
            _spread((r["perplexity"] for r in records), "{:.2f}"),
            _spread((r["tokens_per_s"] for r in records), "{:,.0f}"),
        )
    return table


def draw_plot(result: dict[str, Any], path: Path) -> None:
    """Draw recall against the number of pairs, an arm a line, bars for the spread over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    styles = {"base": ("0.6", ":", "o"), "lpt": ("C0", "--", "s"), "statex": ("C3", "-", "D")}
    for arm, text in ARMS.items():
        entry, (colour, line, marker) = result["arms"][arm], styles[arm]
        values = [[record["recall"][str(n)] for record in entry["seeds"]] for n in NUM_PAIRS]
        axes.errorbar(
            NUM_PAIRS,
            [statistics.mean(v) for v in values],
            yerr=[statistics.stdev(v) if len(v) > 1 else 0.0 for v in values],
            color=colour,
            linestyle=line,
            marker=marker,
            capsize=3,
            label=f"{text}, state {entry['state_numbers']:,}",
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(NUM_PAIRS, [str(n) for n in NUM_PAIRS])
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("key-value pairs in the context")
    axes.set_ylabel("recall accuracy")
    axes.set_title(f"Same tokens, same steps, a bigger state ({result['family']})")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _spread(values: Iterable[float], form: str) -> str:
    values = list(values)
    text = form.format(statistics.mean(values))
    return text if len(values) == 1 else f"{text} ± {form.format(statistics.stdev(values))}"
