"""Results of suites as parts of the report: tables of figures with intervals, the models side by side, and figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

from statex_dist.evaluation.page.figures import Figure, short_number
from statex_dist.evaluation.page.health_figures import capacity_figures, collapse_figures, law_figures
from statex_dist.evaluation.page.html import Section, details, figures, heading, paragraph, table
from statex_dist.evaluation.page.inputs import SUITES, Result, reading
from statex_dist.evaluation.page.runs import flat
from statex_dist.evaluation.page.suite_figures import (
    icl_figures,
    lm_eval_figures,
    mqar_figures,
    perplexity_figures,
    recall_figures,
)

_TITLES = {
    "recall": "Recall: needles in a haystack",
    "mqar": "Recall: key-value pairs",
    "icl": "In-context learning",
    "perplexity": "Perplexity",
    "collapse": "State health: collapse",
    "capacity": "State health: capacity",
    "laws": "State health: laws",
    "lm-eval": "lm-evaluation-harness",
}
_SAID = {
    "recall": "Share of needles that the model says, by the length of the context and the depth of the needle.",
    "mqar": "Share of values that the model gives to their keys. Only what is above guessing is recall.",
    "icl": "Share of queries whose label is the most likely one, by the number of labelled examples before them.",
    "perplexity": "Loss of text by its position. A rise past the training length is the sign to look for.",
    "collapse": "Loss and states past the training length. A head collapses where its state's variance explodes.",
    "capacity": "The longest context at which a passkey is still recalled.",
    "laws": "Laws fitted to several models: the training length that forgetting takes, and the context recalled.",
    "lm-eval": "The harness's own figures; intervals are ours.",
}
_NOT_COMPARED = ("directory", "batch_size", "segment_length", "include_path")


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """A figure of a result.

    Attributes:
        name: What it is.
        value: The figure; None where it is not finite, or only words tell it.
        low: Lower end of its 95 % interval; None for none.
        high: Upper end.
        samples: Samples that it is made of.
        words: What is shown in place of the value.
        headline: Whether it stands in the page's first table.
    """

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None
    samples: int | None = None
    words: str | None = None
    headline: bool = False

    @property
    def text(self) -> str:
        """The figure as people read it."""
        if self.words is not None:
            return self.words
        if self.value is None:
            return "not finite"
        interval = "" if self.low is None or self.high is None else f" ({_number(self.low)} .. {_number(self.high)})"
        return _number(self.value) + interval

    def to_dict(self) -> dict[str, Any]:
        """Return the figure, JSON-able."""
        return {key: value for key, value in asdict(self).items() if key != "headline"}


def _number(value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:,.4g}"


def _estimate(name: str, e: Mapping[str, Any], *, key: str = "accuracy", headline: bool = False) -> Measured:
    return Measured(name=name, value=e[key], low=e["low"], high=e["high"], samples=e.get("samples"), headline=headline)


def _recall(summary: Mapping[str, Any]) -> Iterator[Measured]:
    for task, found in summary["tasks"].items():
        yield _estimate(f"{task}, all lengths", found["overall"], headline=True)
        for length, estimate in found["by_length"].items():
            yield _estimate(f"{task}, {short_number(int(length))} tokens", estimate)


def _mqar(summary: Mapping[str, Any]) -> Iterator[Measured]:
    last = max(summary["by_num_pairs"], key=int)
    for pairs, e in summary["by_num_pairs"].items():
        yield _estimate(f"accuracy, {pairs} pairs", e, headline=pairs == last)
    best = max(summary["by_num_pairs"].values(), key=lambda e: e["pairs_recalled"])
    ends = (best["pairs_recalled_low"], best["pairs_recalled_high"])
    yield Measured(
        name="pairs recalled rather than guessed, at most",
        value=best["pairs_recalled"],
        low=ends[0],
        high=ends[1],
        headline=True,
    )
    capacity = summary["capacity"]
    pairs = capacity["num_pairs"]
    yield Measured(
        name=f"most pairs with {capacity['threshold']:.0%} right",
        value=pairs,
        words="none" if pairs is None else str(pairs),
    )


def _icl(summary: Mapping[str, Any]) -> Iterator[Measured]:
    last = max(summary["by_shots"], key=int)
    for shots, e in summary["by_shots"].items():
        yield _estimate(f"accuracy, {shots} shots", e, headline=shots == last)
    yield Measured(name="chance", value=summary["chance"])


def _perplexity(summary: Mapping[str, Any]) -> Iterator[Measured]:
    loss, low, high = (summary[key] for key in ("loss", "loss_low", "loss_high"))
    ends = [math.exp(value) if value < 700 else None for value in (low, high)]
    yield Measured(name="perplexity", value=summary["perplexity"], low=ends[0], high=ends[1], headline=True)
    yield Measured(name="loss (nats per token)", value=loss, low=low, high=high, samples=summary["documents"])
    if summary["bits_per_byte"] is not None:
        yield Measured(name="bits per byte", value=summary["bits_per_byte"])
    yield Measured(name="target tokens", value=summary["tokens"])
    for bucket in summary["by_position"]:
        yield _estimate(f"loss at {bucket['start']} .. {bucket['end'] - 1}", bucket, key="loss")


def _collapse(summary: Mapping[str, Any]) -> Iterator[Measured]:
    verdict = summary["verdict"]
    yield _position("collapse", verdict["collapsed"], verdict["position"], f" ({verdict['prompt']})", headline=True)
    heads = f"{verdict['heads_collapsed']} of {verdict['heads']}"
    yield Measured(name="heads that collapse", value=verdict["heads_collapsed"], words=heads, headline=True)
    for prompt, told in summary["prompts"].items():
        own, ratio = told["verdict"], told["loss"]["ratio"]
        why = f" ({own['why']})" if own["why"] else ""
        yield _position(f"{prompt}: collapse", own["collapsed"], own["position"], why)
        yield Measured(
            name=f"{prompt}: heads that collapse",
            value=told["heads"]["collapsed"],
            words=f"{told['heads']['collapsed']} of {told['heads']['total']}",
        )
        yield Measured(name=f"{prompt}: loss past the training length, ratio", value=ratio)


def _position(name: str, collapsed: bool, position: int | None, more: str, *, headline: bool = False) -> Measured:
    words = (
        "none seen" if not collapsed else "at an unknown position" if position is None else f"at {position:,} tokens"
    )
    return Measured(name=name, value=position, words=words + (more if collapsed else ""), headline=headline)


def _capacity(summary: Mapping[str, Any]) -> Iterator[Measured]:
    found = summary["capacity"]
    tokens, low, high = found["tokens"], found["low"], found["high"]
    if tokens is None:
        words = "below the shortest tried"
    else:
        words = f"{'at least ' if found['at_least'] else ''}{tokens:,}"
        words += "" if low is None or high is None else f" ({low:,} .. {high:,})"
    name = f"tokens with {summary['settings']['threshold']:.0%} recall"
    yield Measured(name=name, value=tokens, low=low, high=high, words=words, headline=True)
    for step in summary["ladder"]:
        yield _estimate(f"accuracy, {short_number(step['length'])} tokens", step)


def _laws(summary: Mapping[str, Any]) -> Iterator[Measured]:
    for law in ("forget", "recall"):
        fit = summary[law]
        if fit is None:
            yield Measured(name=f"{law}: fit", value=None, words=summary[f"{law}_refused"] or "not asked for")
            continue
        for name, value in fit["parameters"].items():
            error = fit["errors"][name]
            ends = (None, None) if error is None else (value - error, value + error)
            yield Measured(name=f"{law}: {name}", value=value, low=ends[0], high=ends[1])
        yield Measured(name=f"{law}: R squared", value=fit["r_squared"])


def _lm_eval(summary: Mapping[str, Any]) -> Iterator[Measured]:
    for f in summary["figures"]:
        name = f"{f['task']} {f['metric']}" + ("" if f["filter"] == "none" else f" ({f['filter']})")
        words = None
        if f["value"] is not None and f["low"] is None and f["stderr"] is not None:
            words = f"{_number(f['value'])} ± {_number(f['stderr'])}"
        yield Measured(name=name, value=f["value"], low=f["low"], high=f["high"], samples=f["samples"], words=words)


_READERS: Mapping[str, Callable[[Mapping[str, Any]], Iterator[Measured]]] = {
    "recall": _recall,
    "mqar": _mqar,
    "icl": _icl,
    "perplexity": _perplexity,
    "collapse": _collapse,
    "capacity": _capacity,
    "laws": _laws,
    "lm-eval": _lm_eval,
}
_DRAWN: Mapping[str, Callable[[Sequence[Result], Mapping[str, int]], Iterator[Figure]]] = {
    "recall": recall_figures,
    "mqar": mqar_figures,
    "icl": icl_figures,
    "perplexity": perplexity_figures,
    "collapse": collapse_figures,
    "capacity": capacity_figures,
    "laws": lambda results, looks: law_figures(results),
    "lm-eval": lm_eval_figures,
}


def measured(result: Result) -> list[Measured]:
    """Return a result's figures.

    Raises:
        DataError: The summary does not hold what this release writes.
    """
    with reading(result.path):
        return list(_READERS[result.suite](result.summary))


def suite_sections(results: Sequence[Result], names: Sequence[str]) -> Iterator[Section]:
    """Yield a section for each suite.

    Args:
        results: What was found.
        names: All models of the page, in order: each has the same look in every figure.
    """
    looks = {name: number for number, name in enumerate(names)}
    for suite in SUITES:
        found = [result for result in results if result.suite == suite]
        if found:
            with reading(found[0].path):
                drawn = list(_DRAWN[suite](found, looks))
            lines = side_by_side([(result.model, measured(result)) for result in found])
            body = paragraph(_SAID[suite]) + figures(drawn)
            body += table(lines, caption="Figures with their 95 % intervals")
            body += _worst_heads(found) if suite == "collapse" else ""
            yield Section(title=_TITLES[suite], body=body + _settings(found))


def headline_lines(results: Sequence[Result]) -> list[list[str]]:
    """Return the few figures that sum up each model, the models side by side; empty where there is no result."""
    columns: dict[str, list[Measured]] = {}
    for result in results:
        if result.suite == "laws":
            continue
        column = columns.setdefault(result.model, [])
        if not column:
            model = result.summary["model"]
            with reading(result.path):
                facts = (
                    (name, model[key])
                    for name, key in (("parameters", "parameters"), ("state numbers", "state_numbers"))
                )
                column.extend(Measured(name=name, value=n, words=f"{n:,}") for name, n in facts)
        for figure in measured(result):
            if figure.headline:
                column.append(Measured(name=f"{result.suite}: {figure.name}", value=figure.value, words=figure.text))
    return side_by_side(list(columns.items())) if columns else []


def side_by_side(columns: Iterable[tuple[str, Sequence[Measured]]]) -> list[list[str]]:
    """Return a line of names, then one for each figure; what a model has no figure for is left empty."""
    columns = list(columns)
    by_name = [{figure.name: figure.text for figure in found} for _, found in columns]
    titles = dict.fromkeys(chain.from_iterable(by_name))
    head = ["", *(name for name, _ in columns)]
    return [head, *([title, *(found.get(title, "") for found in by_name)] for title in titles)]


def _worst_heads(results: Sequence[Result]) -> str:
    body = ""
    for result in results:
        with reading(result.path):
            lines = [["prompt", "layer", "head", "collapse", "why", "variance ratio", "retention"]]
            for prompt, told in result.summary["prompts"].items():
                for head in told["worst_heads"]:
                    at = _position("", head["collapsed"], head["position"], "").text
                    ratios = ("" if head[key] is None else _number(head[key]) for key in ("sc_ratio", "retention"))
                    lines.append([prompt, str(head["layer"]), str(head["head"]), at, head["why"] or "", *ratios])
        body += details(f"Heads nearest to collapse: {result.model}", table(lines))
    return body


def _settings(results: Sequence[Result]) -> str:
    """Return the settings in which results that stand side by side differ, and all settings of each."""
    named = [(result.model, _own_settings(result)) for result in results]
    keys = dict.fromkeys(key for _, own in named for key in own)
    lines = [[key, *(own.get(key, "") for _, own in named)] for key in keys]
    different = [line for line in lines if len(set(line[1:])) > 1 and line[0] not in _NOT_COMPARED]
    head = ["", *(name for name, _ in named)]
    said = heading("Settings that differ") + table([head, *different]) if different else ""
    return said + (details("Settings", table([head, *lines])) if lines else "")


def _own_settings(result: Result) -> dict[str, str]:
    values = {**flat(result.summary.get("settings") or {}), "data": result.summary.get("data")}
    values["tokenizer"] = (result.summary.get("model") or {}).get("tokenizer")
    values["directory"] = result.path.parent
    return {key: str(value) for key, value in values.items() if value is not None}
