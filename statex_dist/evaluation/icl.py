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
import torch

from statex_dist.data.tokenizer import Tokenizer
from statex_dist.evaluation.icl_tasks import (
    Example,
    IclSettings,
    Trial,
    check_examples,
    draw_trial,
    made_up_examples,
)
from statex_dist.evaluation.journal import EvalUnit, Record
from statex_dist.evaluation.report import Estimate, bootstrap, plot_curve, write_results
from statex_dist.evaluation.scoring import score_continuations
from statex_dist.inference.prefill import Tokens, device_of, evaluating, prefill
from statex_dist.inference.vocabulary import check_vocabulary
from statex_dist.models.core.sequences import LayerState
from statex_dist.models.lm import RecurrentLM

EXAMPLE = "Input: {text}\nLabel: {label}\n\n"
QUERY = "Input: {text}\nLabel:"
"""Behind it a choice is the rest of an example. Its line's end belongs to it: no label then begins another."""


def icl_units(
    model: RecurrentLM, settings: IclSettings, tokenizer: Tokenizer, examples: Sequence[Example] | None = None
) -> list[EvalUnit]:
    """Return the suite's units: a trial each.

    Args:
        model: The model, fp32 where the figures are to be compared.
        settings: What to measure.
        tokenizer: The model's.
        examples: To draw from; None for the made-up task.

    Raises:
        ConfigError: The tokenizer does not fit the model, or there are too few examples of a label.
    """
    check_vocabulary(model, tokenizer)
    check_examples(examples, settings)

    def draw(number: int) -> Trial:
        drawn = examples
        if drawn is None:
            # Rounded up twice, for shots and for queries, as each is drawn in rounds over all labels.
            count = (max(settings.shots) + settings.num_queries) // settings.num_labels + 2
            drawn = made_up_examples(settings, trial=number, count=count)
        return draw_trial(drawn, number, settings)

    def run(number: int) -> list[Record]:
        return _run_trial(model, draw(number), number, settings, tokenizer)

    first = draw(0)
    tokens = sum(len(_shown(tokenizer, shot)) for shot in first.shots)
    asked = sum(len(_encode(tokenizer, QUERY.format(text=query.text))) for query in first.queries)
    tokens += len(settings.shots) * asked
    return [
        EvalUnit(key=f"trial {i}", run=functools.partial(run, i), tokens=tokens) for i in range(settings.num_trials)
    ]


def _run_trial(
    model: RecurrentLM, trial: Trial, number: int, settings: IclSettings, tokenizer: Tokenizer
) -> list[Record]:
    requests = [pair for query in trial.queries for pair in encode_choices(tokenizer, query.text, trial.labels)]
    lengths = np.array([len(choice) for _, choice in requests]).reshape(len(trial.queries), -1)
    records: list[Record] = []
    states: list[LayerState] | None = None
    read = position = 0
    with evaluating(model):
        for shots in sorted(settings.shots):
            if shots > read:
                further = [token for example in trial.shots[read:shots] for token in _shown(tokenizer, example)]
                ids = torch.tensor([further], device=device_of(model))
                _, states = prefill(
                    model, ids, segment_length=settings.segment_length, states=states, position=position
                )
                read, position = shots, position + len(further)
            found = score_continuations(
                model,
                requests,
                batch_size=settings.batch_size,
                segment_length=settings.segment_length,
                start=states,
                position=position,
            )
            scores = np.array([score.logprob for _, score in sorted(found)]).reshape(lengths.shape)
            for i, query in enumerate(trial.queries):
                best = trial.labels[int(scores[i].argmax())]
                best_norm = trial.labels[int((scores[i] / lengths[i]).argmax())]
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


def _shown(tokenizer: Tokenizer, example: Example) -> list[int]:
    return _encode(tokenizer, EXAMPLE.format(text=example.text, label=example.label))


def encode_choices(tokenizer: Tokenizer, text: str, labels: Sequence[str]) -> list[tuple[Tokens, Tokens]]:
    """Return ``(context, choice)`` tokens of a query with each label, tokenised as an example that is shown.

    A tokenizer may join the end of one with the beginning of the other, so the whole is encoded and then split: where
    the query ends, or before that where the labels' tokens already differ. The context is the same for all labels.

    Args:
        tokenizer: The model's.
        text: The query's text.
        labels: All labels.
    """
    wholes = [_encode(tokenizer, EXAMPLE.format(text=text, label=label)) for label in labels]
    split = len(_encode(tokenizer, QUERY.format(text=text)))
    same = next((i for i, tokens in enumerate(zip(*wholes, strict=False)) if len(set(tokens)) > 1), split)
    split = min(split, same)
    return [(whole[:split], whole[split:]) for whole in wholes]


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return [int(token) for token in tokenizer.encode(text)]


def summarise_icl(records: Sequence[Record], settings: IclSettings) -> dict[int, Estimate]:
    """Return the accuracy by number of shots, with intervals over trials: queries of one trial share their examples."""
    return {shots: _over_trials(records, shots, "right", settings) for shots in sorted(settings.shots)}


def _over_trials(records: Sequence[Record], shots: int, key: str, settings: IclSettings) -> Estimate:
    by_trial: dict[int, list[float]] = {}
    for record in records:
        if record["shots"] == shots:
            by_trial.setdefault(record["trial"], []).append(record[key])
    return bootstrap([sum(values) / len(values) for values in by_trial.values()], seed=settings.seed)


def _normalised(estimate: Estimate) -> dict[str, float | None]:
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
    """Write ``icl.json``, ``icl.jsonl`` and ``icl.png`` (accuracy by number of shots)."""
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
        **{"model": model, "data": data, "labels": list(labels), "chance": chance},
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
