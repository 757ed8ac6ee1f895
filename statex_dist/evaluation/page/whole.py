"""The whole page of ``statex report``: whatever was found, in one file."""

from __future__ import annotations

from typing import Any

from statex_dist.evaluation.page.expansions import plan_section
from statex_dist.evaluation.page.html import Section, make_html, paragraph, table
from statex_dist.evaluation.page.inputs import Inputs
from statex_dist.evaluation.page.runs import make_page, runs_section, summarise
from statex_dist.evaluation.page.suites import headline_lines, measured, suite_sections


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
                "state_before": expansion.config.replace(statex=None).state_numbers,
                "state_after": expansion.config.state_numbers,
                "plan": expansion.config.statex and expansion.config.statex.to_dict(),
            }
            for expansion in inputs.expansions
        ],
    }
