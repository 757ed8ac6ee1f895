"""Compare the recall and the perplexity on text of expanded models after equal numbers of tokens.

Run as ``python -m benchmarks.recall_experiment --config configs/experiments/recall_gla.yaml``. Each seed has one
pre-trained model. The arms are this model and its expansions; all train on the same tokens in the same order.
docs/results.md has the results. After a kill the same command continues the experiment.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.experiment_lab import Experiment, Lab
from benchmarks.experiment_stats import device, interval, shown
from statex_dist.config import parse_config
from statex_dist.data.tokenizer import load_tokenizer
from statex_dist.durable.files import write_durably
from statex_dist.errors import ConfigError, StateXError, one_line
from statex_dist.evaluation.documents import read_documents
from statex_dist.evaluation.mqar import generate_mqar, score_mqar
from statex_dist.evaluation.perplexity import PerplexitySettings, run_perplexity
from statex_dist.evaluation.report import panels, png
from statex_dist.log import setup_logging
from statex_dist.models.hf import from_pretrained

BASELINE = "lpt"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment; write ``summary.json`` and ``recall.png``, and print the table."""
    setup_logging()
    try:
        experiment = parse_config(Experiment, sys.argv[1:] if argv is None else argv, prog="recall_experiment")
        if BASELINE not in experiment.arms:
            raise ConfigError(f"a recall experiment needs an arm {BASELINE}, with which the others are compared")
        num_pairs, documents = experiment.setting("num_pairs"), experiment.setting("documents")
        lab = Lab(experiment, lambda model, arm: measure(model, lab.held_out(), num_pairs, documents))
        results = lab.results()
    except StateXError as error:
        sys.stderr.write(f"error: {one_line(error)}\n")
        return error.exit_code
    arms = {name: summarise(records, results[BASELINE]) for name, records in results.items()}
    summary, out = lab.write_summary(arms), Path(experiment.out)
    draw(summary, out / "recall.png")
    Console(width=160).print(make_table(summary, str(experiment.model["model_type"])))
    return 0


def measure(model_dir: Path, held_out: Path, num_pairs: Sequence[int], documents: int) -> dict[str, Any]:
    """Return a model's recall of each document, its loss of each text and its sizes."""
    model = from_pretrained(model_dir, dtype=torch.float32, device=device())
    recall = {}
    for n in num_pairs:
        # Training draws its documents with another seed.
        tokens, mask = generate_mqar(n, documents, seed=0)
        recall[str(n)] = score_mqar(model, tokens, mask).tolist()
    text = run_perplexity(model, read_documents(held_out, load_tokenizer("bytes")), PerplexitySettings())
    return {
        "state_numbers": model.config.state_elements,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "recall": recall,
        "text": [[n, loss] for n, loss in text.documents],
    }


def summarise(records: Sequence[dict[str, Any]], baseline: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return an arm's figures, and their differences to ``baseline`` on the same documents, with 95 % intervals.

    Args:
        records: The results of :func:`measure`, one for each seed.
        baseline: Those of the arm to compare with, for the same seeds in the same order.
    """
    text, base_text = (_by_seed([r["text"] for r in rows]) for rows in (records, baseline))
    tokens = text[:, :, 0]
    recall = {}
    for n in records[0]["recall"]:
        own, other = (_by_seed([r["recall"][n] for r in rows]) for rows in (records, baseline))
        recall[n] = {"accuracy": interval(own), "ahead": interval(own - other), "seeds": own.mean(axis=1).tolist()}
    loss = interval(text[:, :, 1] / tokens, tokens)
    cost = interval((text[:, :, 1] - base_text[:, :, 1]) / tokens, tokens)
    return {
        "state_numbers": records[0]["state_numbers"],
        "parameters": records[0]["parameters"],
        "recall": recall,
        "perplexity": {name: float(np.exp(value)) for name, value in loss.items()},
        # Perplexity of this arm over that of the baseline, minus one.
        "perplexity_change": {name: float(np.expm1(value)) for name, value in cost.items()},
    }


def _by_seed(values: Sequence[Any]) -> npt.NDArray[np.float64]:
    return np.asarray(values, dtype=np.float64)


def make_table(summary: dict[str, Any], family: str) -> Table:
    """Return the arms as a table."""
    pairs = list(next(iter(summary["arms"].values()))["recall"])
    table = Table(title=f"{family}, seeds {summary['seeds']}: recall by number of pairs, text (95 % intervals)")
    for head in ("arm", "state", "parameters", *(f"{n} pairs" for n in pairs), f"{pairs[-1]}: ahead of LPT"):
        table.add_column(head, justify="left" if head == "arm" else "right")
    table.add_column("perplexity", justify="right")
    table.add_column("against LPT", justify="right")
    for name, arm in summary["arms"].items():
        table.add_row(
            name,
            f"{arm['state_numbers']:,}",
            f"{arm['parameters']:,}",
            *(shown(arm["recall"][n]["accuracy"], "{:.3f}") for n in pairs),
            shown(arm["recall"][pairs[-1]]["ahead"], "{:+.3f}"),
            shown(arm["perplexity"], "{:.3f}"),
            shown({key: 100 * value for key, value in arm["perplexity_change"].items()}, "{:+.2f}") + " %",
        )
    return table


def draw(summary: dict[str, Any], path: Path) -> None:
    """Draw every arm's accuracy over the number of pairs, with intervals."""
    figure, (axes,) = panels(["Associative recall"])
    styles = [(marker, line) for line in ("-", "--", ":") for marker in "osD^vP"]
    for index, (name, arm) in enumerate(summary["arms"].items()):
        pairs = [int(n) for n in arm["recall"]]
        values = [arm["recall"][str(n)]["accuracy"] for n in pairs]
        low, high = ([abs(v["mean"] - v[end]) for v in values] for end in ("low", "high"))
        marker, line = styles[index % len(styles)]
        axes.errorbar(
            np.array(pairs) * 1.02 ** (index - len(summary["arms"]) / 2),
            [v["mean"] for v in values],
            yerr=[low, high],
            marker=marker,
            linestyle=line,
            capsize=2,
            linewidth=1.3,
            label=f"{name}, state {arm['state_numbers']:,}",
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(pairs, [str(n) for n in pairs])
    axes.minorticks_off()
    axes.set(xlabel="key-value pairs in the context", ylabel="recall (95 % interval)", ylim=(-0.03, 1.03))
    axes.grid(axis="y", color="#dddddd")
    axes.legend(fontsize=8, frameon=False)
    write_durably(path, png(figure))


if __name__ == "__main__":
    sys.exit(main())
