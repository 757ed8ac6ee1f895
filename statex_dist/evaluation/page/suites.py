"""Results of suites as parts of the report: tables of figures with intervals, the models side by side, and figures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain

from statex_dist.config import flat
from statex_dist.evaluation.page.figures import Figure, short_number
from statex_dist.evaluation.page.health_figures import capacity_figures, collapse_figures, law_figures
from statex_dist.evaluation.page.html import Section, details, figures, heading, paragraph, table
from statex_dist.evaluation.page.inputs import SUITES, Result, reading
from statex_dist.evaluation.page.measures import Measured, estimate_of, measured, number, position_of
from statex_dist.evaluation.page.suite_figures import (
    MQAR_LEVELS,
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
    "mqar": "Share of values that the model gives to their keys. Dotted: what is right without knowing whose each is.",
    "icl": "Share of queries whose label is the most likely one, by the number of labelled examples before them.",
    "perplexity": "Loss of text by its position. A rise past the training length is the sign to look for.",
    "collapse": "Loss and states past the training length. A head collapses where its state's variance explodes.",
    "capacity": "The longest context at which a passkey is still recalled.",
    "laws": "Laws fitted to several models: the training length that forgetting takes, and the context recalled.",
    "lm-eval": "The harness's own figures; intervals are ours.",
}
_NOT_COMPARED = ("directory", "batch_size", "segment_length", "include_path")


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


def _cells(results: Sequence[Result]) -> Iterator[str]:
    """Yield the cells of each heat map with their intervals, by depth and length."""
    for result in results:
        for task, found in result.summary["tasks"].items():
            cells = {(cell["length"], cell["depth"]): estimate_of("", cell).text for cell in found["cells"]}
            lengths, depths = sorted({n for n, _ in cells}), sorted({d for _, d in cells})
            lines = [["depth", *(f"{short_number(length)} tokens" for length in lengths)]]
            lines += [[f"{100 * d:.0f} %", *(cells.get((n, d), "") for n in lengths)] for d in depths]
            yield details(f"{task} by depth and length: {result.model}", table(lines))


def _levels(results: Sequence[Result]) -> Iterator[str]:
    """Yield what is right without recall, by number of pairs."""
    for result in results:
        asked = result.summary["by_num_pairs"]
        known = {key: name for key, name in MQAR_LEVELS.items() if all(key in e for e in asked.values())}
        lines = [["pairs", *known.values()]] + [[n, *(number(e[key]) for key in known)] for n, e in asked.items()]
        yield details(f"Right without recall: {result.model}", table(lines))


def _health(results: Sequence[Result]) -> Iterator[str]:
    """Yield the loss by position on each prompt, the models side by side, then each model's worst heads."""
    for prompt in dict.fromkeys(prompt for result in results for prompt in result.summary["prompts"]):
        columns = []
        for result in (r for r in results if prompt in r.summary["prompts"]):
            told = result.summary["prompts"][prompt]
            buckets = [{**bucket, "samples": told["sequences"]} for bucket in told["loss"]["by_position"]]
            losses = [estimate_of(f"{b['start']} .. {b['end']}", b, key="loss") for b in buckets]
            columns.append((result.model, losses))
        yield details(f"Loss on {prompt} by position", table(side_by_side(columns)))
    for result in results:
        lines = [["prompt", "layer", "head", "collapse", "why", "variance ratio", "retention"]]
        for prompt, told in result.summary["prompts"].items():
            for head in told["worst_heads"]:
                at = position_of("", head["collapsed"], head["position"], "").text
                ratios = ("" if head[key] is None else number(head[key]) for key in ("sc_ratio", "retention"))
                lines.append([prompt, str(head["layer"]), str(head["head"]), at, head["why"] or "", *ratios])
        yield details(f"Heads nearest to collapse: {result.model}", table(lines))


def _law_points(results: Sequence[Result]) -> Iterator[str]:
    """Yield what each law was fitted to."""
    for result in results:
        for law in ("forget", "recall"):
            lines = [["state numbers", "tokens", "used"]]
            for point in result.summary[f"{law}_points"]:
                if point["tokens"] is not None:
                    told = Measured(name="", value=point["tokens"], low=point["low"], high=point["high"])
                    used = "yes" if point["used"] else f"no: {point['why']}"
                    lines.append([f"{point['state_numbers']:,}", told.text, used])
            if len(lines) > 1:
                yield details(f"Points of the {law} law: {result.path.parent}", table(lines))


_POINTS: Mapping[str, Callable[[Sequence[Result]], Iterator[str]]] = {
    "recall": _cells,
    "mqar": _levels,
    "collapse": _health,
    "laws": _law_points,
}


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
                points = "".join(_POINTS[suite](found)) if suite in _POINTS else ""
            lines = side_by_side([(result.model, measured(result)) for result in found])
            said = [f"{r.model}: {r.summary['says']}" for r in found if r.summary.get("says")]
            body = "".join(map(paragraph, [_SAID[suite], *said])) + figures(drawn)
            body += table(lines, caption="Figures with their 95 % intervals") + points
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
