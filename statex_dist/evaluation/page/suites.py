"""Results of suites as parts of the report: tables of figures with intervals, the models side by side, and figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from statex_dist.config import flat
from statex_dist.evaluation.page.html import Blocks, Section, details, figures, heading, paragraph, table
from statex_dist.evaluation.page.inputs import reading
from statex_dist.evaluation.suites.base import Measured, Result, side_by_side
from statex_dist.evaluation.suites.registry import find_suite, suite_names

_NOT_COMPARED = ("directory", "batch_size", "segment_length", "include_path")


def measured(result: Result) -> list[Measured]:
    """Return a result's figures.

    Raises:
        DataError: The summary does not hold what this release writes.
    """
    with reading(result.path):
        return list(find_suite(result.suite).measured(result.summary))


def suite_sections(results: Sequence[Result], names: Sequence[str]) -> Iterator[Section]:
    """Yield a section for each suite.

    Args:
        results: What was found.
        names: All models of the page, in order: each has the same look in every figure.
    """
    looks = {name: number for number, name in enumerate(names)}
    for suite in map(find_suite, suite_names()):
        found = [result for result in results if result.suite == suite.name]
        if found:
            with reading(found[0].path):
                drawn = figures(suite.figures(found, looks))
                points = [block for title, lines in suite.details(found) for block in details(title, table(lines))]
            lines = side_by_side((result.model, measured(result)) for result in found)
            said = [suite.said, *(f"{r.model}: {r.summary['says']}" for r in found if r.summary.get("says"))]
            body = [block for text in said for block in paragraph(text)] + drawn
            body += table(lines, caption="Figures with their 95 % intervals") + points
            yield Section(title=suite.title, body=body + _settings(found))


def headline_lines(results: Sequence[Result]) -> list[list[str]]:
    """Return the few figures that sum up each model, the models side by side; empty where there is no result."""
    columns: dict[str, list[Measured]] = {}
    for result in results:
        if not find_suite(result.suite).of_model:
            continue
        column = columns.setdefault(result.model, [])
        if not column:
            model = result.summary["model"]
            with reading(result.path):
                facts = (("parameters", model["parameters"]), ("state numbers", model["state_numbers"]))
                column.extend(Measured(name=name, value=n, words=f"{n:,}") for name, n in facts)
        for figure in measured(result):
            if figure.headline:
                column.append(Measured(name=f"{result.suite}: {figure.name}", value=figure.value, words=figure.text))
    return side_by_side(columns.items()) if columns else []


def _settings(results: Sequence[Result]) -> Blocks:
    """Return the settings in which results that stand side by side differ, and all settings of each."""
    named = [(result.model, _own_settings(result)) for result in results]
    keys = dict.fromkeys(key for _, own in named for key in own)
    lines = [[key, *(own.get(key, "") for _, own in named)] for key in keys]
    different = [line for line in lines if len(set(line[1:])) > 1 and line[0] not in _NOT_COMPARED]
    head = ["", *(name for name, _ in named)]
    said = heading("Settings that differ") + table([head, *different]) if different else []
    return said + (details("Settings", table([head, *lines])) if lines else [])


def _own_settings(result: Result) -> dict[str, str]:
    values = {**flat(result.summary.get("settings") or {}), "data": result.summary.get("data")}
    values["tokenizer"] = (result.summary.get("model") or {}).get("tokenizer")
    values["directory"] = result.path.parent
    return {key: str(value) for key, value in values.items() if value is not None}
