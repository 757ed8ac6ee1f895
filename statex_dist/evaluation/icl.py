"""The ``icl`` suite: does a model learn a classification from examples in its context, and from how many?

A trial reads labelled examples, one after the other, with a carried state. After 1, 2, 4, ... of them it stops and
classifies the same queries from that state: a query's text is followed by each label in turn, and the label whose
tokens are most likely is the answer. So more shots are always the former shots and further ones, the examples are read
once, and every candidate starts from one shared state. Format and scoring are those of the in-context classification
tests of Brown et al. (arXiv 2005.14165, section 2.4). Long labels are at a disadvantage; so the accuracy by likelihood
per token is given beside it (``acc_norm`` of lm-evaluation-harness is the like).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from statex_dist.data.tokenizer import Tokenizer
from statex_dist.errors import ConfigError
from statex_dist.evaluation.icl_tasks import Example, IclSettings, Trial, draw_trial, made_up_examples
from statex_dist.evaluation.journal import Record, Unit
from statex_dist.evaluation.report import RESULT_VERSION, Estimate, bootstrap, plot_curve, write_results
from statex_dist.evaluation.streaming import (
    check_vocabulary,
    device_of,
    evaluating,
    explain_not_finite,
    prefill,
    rows_that_fit,
)
from statex_dist.models.lm import RecurrentLM
from statex_dist.models.sequence import LayerState

EXAMPLE = "Input: {text}\nLabel: {label}\n\n"
QUERY = "Input: {text}\nLabel:"
CHOICE = " {label}\n"
"""The line's end belongs to a choice: no label is then the beginning of another."""

IntArray = npt.NDArray[np.int64]


def icl_units(
    model: RecurrentLM, settings: IclSettings, tokenizer: Tokenizer, examples: Sequence[Example] | None = None
) -> list[Unit]:
    """Return the suite's units: a trial each.

    Args:
        model: The model, fp32 where the figures are to be compared.
        settings: What to measure.
        tokenizer: The model's.
        examples: To draw from; None for the made-up task.

    Raises:
        ConfigError: The tokenizer does not fit the model, or there are too few examples.
    """
    check_vocabulary(model, tokenizer)
    needed = max(settings.shots) + settings.num_queries
    if examples is not None and len(examples) < needed:
        raise ConfigError(
            f"icl needs {needed} examples for {max(settings.shots)} shots and {settings.num_queries} queries, the file "
            f"has {len(examples)}; set --shots or --num-queries lower"
        )

    def draw(number: int) -> Trial:
        drawn = examples
        if drawn is None:
            # Rounded up twice, for shots and for queries, as each is drawn in rounds over all labels.
            drawn = made_up_examples(settings, trial=number, count=needed // settings.num_labels + 2)
        return draw_trial(drawn, number, settings)

    def run(number: int) -> list[Record]:
        return _run_trial(model, draw(number), number, settings, tokenizer)

    first = draw(0)
    rows = len(settings.shots) * len(first.labels)
    tokens = sum(len(_shown(tokenizer, shot)) for shot in first.shots)
    tokens += rows * sum(len(_asked(tokenizer, query)) for query in first.queries)
    return [Unit(key=f"trial {i}", run=functools.partial(run, i), tokens=tokens) for i in range(settings.num_trials)]


def _run_trial(
    model: RecurrentLM, trial: Trial, number: int, settings: IclSettings, tokenizer: Tokenizer
) -> list[Record]:
    queries = [_asked(tokenizer, query) for query in trial.queries]
    choices = [_encode(tokenizer, CHOICE.format(label=label)) for label in trial.labels]
    records: list[Record] = []
    states: list[LayerState] | None = None
    read = position = 0
    with evaluating(model):
        for shots in sorted(settings.shots):
            if shots > read:
                further = [_shown(tokenizer, example) for example in trial.shots[read:shots]]
                ids = torch.as_tensor(np.concatenate(further)[None], device=device_of(model))
                _, states = prefill(
                    model, ids, segment_length=settings.segment_length, states=states, position=position
                )
                read, position = shots, position + ids.shape[1]
            scores = score_choices(model, states, queries, choices, batch_size=settings.batch_size, position=position)
            lengths = np.array([len(choice) for choice in choices])
            for i, query in enumerate(trial.queries):
                best = trial.labels[int(scores[i].argmax())]
                best_norm = trial.labels[int((scores[i] / lengths).argmax())]
                shares = np.exp(scores[i] - scores[i].max())
                own = trial.labels.index(query.label)
                records.append(
                    {
                        **{"trial": number, "shots": shots, "query": i, "text": query.text, "label": query.label},
                        **{"answer": best, "right": best == query.label, "right_norm": best_norm == query.label},
                        "probability": float(shares[own] / shares.sum()),
                    }
                )
    return records


def score_choices(
    model: RecurrentLM,
    states: list[LayerState] | None,
    queries: Sequence[IntArray],
    choices: Sequence[IntArray],
    *,
    batch_size: int = 64,
    position: int = 0,
) -> npt.NDArray[np.float64]:
    """Return the log-likelihood in nats of each choice's tokens behind each query, from one shared state.

    Args:
        model: The model, in evaluation mode.
        states: Each layer's state ``[1, ...]`` before the queries, or None for zero; left as it is.
        queries: ``Q`` rows of ids.
        choices: ``L`` rows of ids.
        batch_size: Rows per forward pass, fewer where the logits would take too much memory.
        position: Position of a query's first token, for messages.

    Returns:
        ``[Q, L]``.

    Raises:
        CheckpointError: The logits are not finite; layer and position are named.
    """
    device = device_of(model)
    rows = [(query, choice) for query in queries for choice in choices]
    width = max(len(query) + len(choice) - 1 for query, choice in rows)
    batch_size = rows_that_fit(model, width, batch_size)
    scores: list[float] = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        # Filled up on the right: a causal model's scores do not see it, and the states are dropped.
        inputs = np.zeros((len(part), width), np.int64)
        for row, (query, choice) in zip(inputs, part, strict=True):
            row[: len(query) + len(choice) - 1] = np.concatenate([query, choice[:-1]])
        ids = torch.as_tensor(inputs, device=device)
        shared = None if states is None else [_repeated(state, len(part)) for state in states]
        logits = model(ids, states=shared, output_states=True).logits
        if not torch.isfinite(logits).all():
            raise explain_not_finite(model, ids, shared, position=position)
        for i, (query, choice) in enumerate(part):
            asked = logits[i, len(query) - 1 : len(query) + len(choice) - 1].double().log_softmax(dim=-1)
            wanted = torch.as_tensor(choice, device=device)[:, None]
            scores.append(float(asked.gather(1, wanted).sum()))
    return np.array(scores).reshape(len(queries), len(choices))


def _repeated(state: LayerState, rows: int) -> LayerState:
    return tuple(tensor.expand(rows, *tensor.shape[1:]).contiguous() for tensor in state)


def _shown(tokenizer: Tokenizer, example: Example) -> IntArray:
    return _encode(tokenizer, EXAMPLE.format(text=example.text, label=example.label))


def _asked(tokenizer: Tokenizer, example: Example) -> IntArray:
    return _encode(tokenizer, QUERY.format(text=example.text))


def _encode(tokenizer: Tokenizer, text: str) -> IntArray:
    return tokenizer.encode(text).astype(np.int64)


def summarise_icl(records: Sequence[Record], settings: IclSettings) -> dict[int, Estimate]:
    """Return the accuracy by number of shots, with intervals over trials: queries of one trial share their examples."""
    return {shots: _over_trials(records, shots, "right", settings) for shots in sorted(settings.shots)}


def _over_trials(records: Sequence[Record], shots: int, key: str, settings: IclSettings) -> Estimate:
    by_trial: dict[int, list[float]] = {}
    for record in records:
        if record["shots"] == shots:
            by_trial.setdefault(record["trial"], []).append(record[key])
    return bootstrap([sum(values) / len(values) for values in by_trial.values()], seed=settings.seed)


def _normalised(estimate: Estimate) -> dict[str, float]:
    return {"accuracy_norm": estimate.mean, "low_norm": estimate.low, "high_norm": estimate.high}


def write_icl(
    records: Sequence[Record],
    directory: Path,
    settings: IclSettings,
    *,
    labels: Sequence[str],
    data: str | None,
    model: Mapping[str, Any],
    timing: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write ``icl.json``, ``icl.jsonl`` and ``icl.png`` (accuracy by number of shots).

    Args:
        records: What the units of :func:`icl_units` found.
        directory: An existing directory.
        settings: What was asked for.
        labels: All labels.
        data: Where the examples came from; None for the made-up task.
        model: What is known of the model.
        timing: How long it took.

    Returns:
        The files, the summary first.
    """
    result, chance = summarise_icl(records, settings), 1 / len(labels)
    plot = plot_curve(
        [max(shots, 0.5) for shots in result],
        list(result.values()),
        title="In-context classification",
        x_label="shots",
        y_label="accuracy (band: 95 % interval)",
        y_limits=(-0.03, 1.03),
        reference=([chance] * len(result), f"chance, {len(labels)} labels"),
        tick_labels=[str(shots) for shots in result],
    )
    summary = {
        **{"version": RESULT_VERSION, "suite": "icl", "model": model, "data": data},
        **{"labels": list(labels), "chance": chance},
        "by_shots": {
            str(shots): {
                **estimate.to_dict(),
                **_normalised(_over_trials(records, shots, "right_norm", settings)),
                "queries": sum(record["shots"] == shots for record in records),
                "probability": _over_trials(records, shots, "probability", settings).mean,
            }
            for shots, estimate in result.items()
        },
        "settings": dataclasses.asdict(settings),
        "timing": timing or {},
    }
    return write_results(directory, "icl", summary, records, {"icl.png": plot})
