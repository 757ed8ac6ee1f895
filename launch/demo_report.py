"""The demo's table and plot."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from rich.table import Table

ARMS = {"base": "pre-trained", "lpt": "LPT", "statex": "StateX"}
CAPTION = "LPT: post-trained as it is. StateX: expanded, then post-trained on the same tokens."
NUM_PAIRS = (8, 16, 32, 64)


def make_table(result: dict[str, Any]) -> Table:
    """Return the demo's table: a column an arm, means over seeds with their spread (standard deviation)."""
    arms = [result["arms"][arm] for arm in ARMS]
    seeds = len(arms[0]["seeds"])
    table = Table(title=f"{result['family']}, {seeds} seed{'s' if seeds > 1 else ''}", caption=CAPTION)
    table.add_column("")
    for arm in ARMS.values():
        table.add_column(arm, justify="right")
    table.add_row("state elements", *(f"{arm['state_numbers']:,}" for arm in arms))
    table.add_row("parameters", *(f"{arm['parameters']:,}" for arm in arms), end_section=True)
    for n in NUM_PAIRS:
        accuracies = ([record["recall"][str(n)] for record in arm["seeds"]] for arm in arms)
        table.add_row(f"recall of {n} pairs", *(_spread(values, "{:.3f}") for values in accuracies))
    table.rows[-1].end_section = True
    for title, key, form in (
        ("text perplexity", "perplexity", "{:.2f}"),
        ("training tokens/s", "tokens_per_s", "{:,.0f}"),
    ):
        table.add_row(title, *(_spread([record[key] for record in arm["seeds"]], form) for arm in arms))
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


def _spread(values: list[float], form: str) -> str:
    text = form.format(statistics.mean(values))
    return text if len(values) == 1 else f"{text} ± {form.format(statistics.stdev(values))}"
