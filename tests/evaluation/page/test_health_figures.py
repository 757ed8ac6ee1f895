"""The figures of state health where a result has no interval, and where a law's base is beyond a float."""

from __future__ import annotations

import json

import pytest

from statex_dist.evaluation.page.health_figures import collapse_figures, law_figures
from statex_dist.evaluation.suites.base import Result
from statex_dist.state.laws import fit_exponential
from tests.evaluation.page.fixtures import collapse, laws


def result_of(directory, suite, summary):
    # As it is read from its file: nothing may be there that JSON does not have.
    values = json.loads(json.dumps(summary, allow_nan=False))
    return Result(suite=suite, model="m", path=directory / f"{suite}.json", summary=values)


@pytest.mark.filterwarnings("error")
def test_one_sequence_has_its_line_and_no_band(tmp_path):
    drawn = {}
    for sequences in (4, 1):
        summary = collapse(1)
        for bucket in summary["prompts"]["newlines"]["loss"]["by_position"] if sequences == 1 else ():
            bucket.update(low=None, high=None)
        (figure,) = collapse_figures([result_of(tmp_path, "collapse", summary)], {"m": 0})
        assert "nan" not in figure.svg.lower()
        drawn[sequences] = figure
    assert drawn[4].text == drawn[1].text, "the loss itself is there"
    assert drawn[4].svg.count("<path") == drawn[1].svg.count("<path") + 1, "the band"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("unit", "said"), [(1.0, "2^N - 1)"), (1e-3, "(exp(693 N) - 1)")])
def test_an_exponential_law_is_drawn_and_said(tmp_path, unit, said):
    sizes = [1.0, 2.0, 3.0, 4.0, 5.0]
    law = fit_exponential([unit * size for size in sizes], [2.0**size for size in sizes])
    points = [
        {
            "state_numbers": round(1e6 * unit * x),
            "tokens": round(1024 * 2.0**x),
            "low": None,
            "high": None,
            "used": True,
        }
        for x in sizes
    ]
    summary = {**laws(), "recall": law.to_dict(), "recall_points": [point | {"why": ""} for point in points]}
    _, figure = law_figures([result_of(tmp_path, "laws", summary)])
    assert said in figure.text
    assert "nan" not in figure.svg.lower()
