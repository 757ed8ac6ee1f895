"""The whole page of ``statex report``: whatever was found, in one file; results of suites with their intervals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from statex_dist.config import flat
from statex_dist.evaluation.page.expansions import plan_section
from statex_dist.evaluation.page.html import Blocks, Section, details, figures, heading, make_html, paragraph, table
from statex_dist.evaluation.page.inputs import Inputs, reading
from statex_dist.evaluation.page.runs import make_page, runs_section, summarise
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
                facts = (("parameters", model["parameters"]), ("state elements", model["state_numbers"]))
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


def make_report(inputs: Inputs) -> str:
    """Return the page on all that was found.

    Raises:
        DataError: A result does not hold what this release writes.
    """
    if not inputs.results and not inputs.expansions and not inputs.notes:
        return make_page(inputs.runs)
    sections = []
    if lines := headline_lines(inputs.results):
        sections.append(Section(title="At a glance", body=table(lines, caption="With 95 % intervals where known")))
    if inputs.expansions:
        sections.append(plan_section(inputs.expansions))
    if inputs.runs:
        sections.append(runs_section(inputs.runs, title="Training"))
    sections += suite_sections(inputs.results, inputs.models)
    counts = (
        (len(inputs.runs), "training run"),
        (len(inputs.models), "evaluated model"),
        (len(inputs.expansions), "expansion"),
    )
    found = [f"{count} {what}{'s' if count > 1 else ''}" for count, what in counts if count]
    notes = [block for note in inputs.notes for block in paragraph(note, strong="Left out")]
    named = [*(run.name for run in inputs.runs), *inputs.models, *(expansion.name for expansion in inputs.expansions)]
    title = f"Report on {named[0]}" if len(set(named)) == 1 else "Report"
    return make_html(title, sections, lead=paragraph(", ".join(found)) + notes)


def to_dict(inputs: Inputs) -> dict[str, Any]:
    """Return the figures of all that was found, JSON-able.

    Raises:
        DataError: A result does not hold what this release writes.
    """
    return {
        "runs": [summarise(run).to_dict() for run in inputs.runs],
        "results": [
            {
                "suite": result.suite,
                "model": result.model,
                "file": str(result.path),
                "figures": [figure.to_dict() for figure in measured(result)],
            }
            for result in inputs.results
        ],
        "expansions": [
            {
                "name": expansion.name,
                "model_type": expansion.config.MODEL_TYPE,
                "state_before": expansion.config.replace(statex=None).state_elements,
                "state_after": expansion.config.state_elements,
                "plan": expansion.config.statex and expansion.config.statex.to_dict(),
            }
            for expansion in inputs.expansions
        ],
    }
