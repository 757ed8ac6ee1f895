"""Compare measures against state collapse on a model whose state is too large for its training length.

Run as ``python -m benchmarks.collapse_experiment --config configs/experiments/collapse_mamba2.yaml``. One model per
seed is trained at a short length. It is then trained further in several ways, on the same number of tokens each, or
measured with a mitigation that needs no training. docs/results.md has the results. After a kill the same command
continues the experiment.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.experiment_lab import Arm, Experiment, Lab
from benchmarks.experiment_stats import device, interval, shown
from statex_dist.config import parse_config
from statex_dist.data.tokenizer import load_tokenizer
from statex_dist.durable.files import write_durably
from statex_dist.errors import ConfigError, StateXError, one_line
from statex_dist.evaluation.documents import read_documents
from statex_dist.evaluation.health.collapse import read_tokens, recurrent_states, state_statistics
from statex_dist.evaluation.report import panels, png
from statex_dist.inference.prefill import evaluating
from statex_dist.log import setup_logging
from statex_dist.models.hf import from_pretrained
from statex_dist.models.mitigation import parse_mitigation

_SEGMENT = 64
"""Tokens read at once: a divisor of every edge, and of the pieces at whose ends a state is normalised."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment; write ``summary.json`` and ``collapse.png``, and print the table."""
    setup_logging()
    try:
        experiment = parse_config(Experiment, sys.argv[1:] if argv is None else argv, prog="collapse_experiment")
        length = experiment.setting("train_length")
        if not isinstance(length, int) or length < 2 * _SEGMENT or length % (2 * _SEGMENT):
            raise ConfigError(f"settings.train_length must be a multiple of {2 * _SEGMENT}, not {length}")
        lab = Lab(experiment, lambda model, arm: measure(model, arm, lab.held_out()))
        results = lab.results()
    except StateXError as error:
        sys.stderr.write(f"error: {one_line(error)}\n")
        return error.exit_code
    first = next(iter(results.values()))
    arms = {name: summarise(records, first, length) for name, records in results.items()}
    summary = lab.write_summary(arms)
    out = Path(experiment.out)
    draw(results, length, out / "collapse.png")
    Console(width=160).print(make_table(summary, str(experiment.model["model_type"]), length))
    return 0


def measure(model_dir: Path, arm: Arm, held_out: Path) -> dict[str, Any]:
    """Return the loss of each document by segment, and each layer's and head's state by segment.

    ``loss`` is ``[documents, segments]``, in nats per token; ``variance`` is ``[segments, layers, heads]``, the mean
    over documents of the variance of a head's state after the segment.
    """
    model = from_pretrained(model_dir, dtype=torch.float32, device=device())
    model.mitigation = parse_mitigation(arm.mitigation) if arm.mitigation else None
    documents = [piece.tokens for piece in read_documents(held_out, load_tokenizer("bytes"))]
    # A document's last token has no next one; whole segments only.
    length = (min(map(len, documents)) - 1) // _SEGMENT * _SEGMENT
    tokens = np.stack([document[: length + 1] for document in documents]).astype(np.int32)
    losses, variances, states = [], [], None
    with evaluating(model):
        for start in range(0, length, _SEGMENT):
            states, loss = read_tokens(model, tokens, start, start + _SEGMENT, states, _SEGMENT)
            losses.append(loss / _SEGMENT)
            recurrent = recurrent_states(model, states)
            variances.append([state_statistics(state[0])["variance"].mean(axis=0).tolist() for state in recurrent])
    return {"state_numbers": model.config.state_elements, "loss": np.transpose(losses).tolist(), "variance": variances}


def summarise(
    records: Sequence[dict[str, Any]], baseline: Sequence[dict[str, Any]], train_length: int
) -> dict[str, Any]:
    """Return an arm's loss within the training length and beyond, and how far states grow, with 95 % intervals.

    Args:
        records: What :func:`measure` returned, one for each seed.
        baseline: The same of the arm to compare with, on the same documents.
        train_length: Tokens that the first model was trained on.
    """
    loss, base = (np.array([record["loss"] for record in rows]) for rows in (records, baseline))
    edges = spans(train_length, loss.shape[2] * _SEGMENT)  # loss is [seeds, documents, segments]
    parts = {f"{a}..{b}": loss[:, :, a // _SEGMENT : b // _SEGMENT].mean(axis=2) for a, b in edges}
    last = slice(edges[-1][0] // _SEGMENT, edges[-1][1] // _SEGMENT)
    within = train_length // _SEGMENT
    growth = []
    for record in records:
        variance = np.array(record["variance"]).reshape(len(record["variance"]), -1)
        growth.append(float((variance[within:].max(axis=0) / variance[:within].max(axis=0)).max()))
    return {
        "state_numbers": records[0]["state_numbers"],
        "loss": {name: interval(values) for name, values in parts.items()},
        # Paired by document: texts differ more than arms do.
        "change": interval((loss[:, :, last] - base[:, :, last]).mean(axis=2)),
        # Of the worst head: its largest variance past the length over that within it.
        "variance_growth": growth,
    }


def spans(train_length: int, length: int) -> list[tuple[int, int]]:
    """Return the second half of the training length, then an octave each up to ``length``."""
    edges = [(train_length // 2, train_length)]
    while edges[-1][1] < length:
        edges.append((edges[-1][1], min(2 * edges[-1][1], length)))
    return edges


def make_table(summary: dict[str, Any], family: str, train_length: int) -> Table:
    """Return the arms as a table."""
    arms = summary["arms"]
    table = Table(title=f"{family}, first trained at {train_length} tokens, seeds {summary['seeds']}: nats per token")
    for head in (
        "arm",
        *next(iter(arms.values()))["loss"],
        f"last, against {next(iter(arms))}",
        "growth of the worst head's variance",
    ):
        table.add_column(head, justify="left" if head == "arm" else "right")
    for name, arm in arms.items():
        losses = (shown(value, "{:.3f}") for value in arm["loss"].values())
        growth = ", ".join(f"{value:.1f}" for value in arm["variance_growth"])
        table.add_row(name, *losses, shown(arm["change"], "{:+.3f}"), growth)
    return table


def draw(results: dict[str, list[dict[str, Any]]], train_length: int, path: Path) -> None:
    """Draw every arm's loss over the position, the mean over seeds and documents."""
    figure, (axes,) = panels([f"Loss by position; the line is the first training length, {train_length}"])
    for index, (name, records) in enumerate(results.items()):
        loss = np.array([record["loss"] for record in records]).mean(axis=(0, 1))
        edges = spans(2 * _SEGMENT, len(loss) * _SEGMENT)
        values = [loss[a // _SEGMENT : b // _SEGMENT].mean() for a, b in edges]
        style = ("-", "--", ":")[index // 6 % 3]
        axes.plot([b for _, b in edges], values, linestyle=style, marker="osD^vP"[index % 6], markersize=4, label=name)
    axes.axvline(train_length, color="#777777", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="position (tokens), up to", ylabel="nats per token")
    axes.grid(axis="y", color="#dddddd")
    axes.legend(fontsize=8, frameon=False)
    write_durably(path, png(figure))


if __name__ == "__main__":
    sys.exit(main())
