"""The comparison of features with grown keys: both forms have a state of the same size."""

from __future__ import annotations

import json

import pytest

from benchmarks import cpu_features
from benchmarks.cpu_features import CASES, FORMS
from benchmarks.measure import Record


@pytest.mark.parametrize("kind", sorted({case.kind for case in CASES}))
def test_every_form_runs(kind):
    for form in FORMS:
        assert cpu_features.scan(kind, form, 8, (2, 8, 8))().isfinite().all()


def test_the_table_has_ratios(tmp_path):
    record = Record({}, out=tmp_path / "rows.json")
    record.add({"case": "a", "tokens": 64, "grown keys": (0.2, 2**22), "features": (0.1, 2**21)})
    row = cpu_features.render(json.loads((tmp_path / "rows.json").read_text())).splitlines()[-1]
    assert [cell.strip() for cell in row.split("|")[3:-1]] == ["200", "100", "0.5", "4", "2", "0.5"]
