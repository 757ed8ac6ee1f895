"""The forms that the CPU benchmark times compute the same thing, forward and backward."""

import json

import pytest
import torch

from benchmarks import cpu_scan
from benchmarks.cpu_scan import CASES, FORMS, GOALS, LONG, OURS, Case
from benchmarks.measure import Record

SIZES = {"gla": (2, 8, 16), "ssd": (4, 8, 16), "delta": (2, 8, 16), "kda": (2, 8, 16), "mixer": (4, 8, 16)}


@pytest.mark.parametrize(("kind", "peer"), sorted({(case.kind, peer) for case in CASES for peer in case.peers}))
def test_peers_compute_the_same(kind: str, peer: str):
    ours, theirs = (FORMS[kind](form, 128, SIZES[kind]) for form in (OURS, peer))
    first, second = ours(), theirs()
    assert first.requires_grad
    assert second.requires_grad
    torch.testing.assert_close(first, second.reshape(first.shape), rtol=1e-3, atol=1e-4)


def test_every_goal_is_of_a_case_that_runs():
    assert {(case.kind, peer) for case in CASES for peer, lengths in case.peers.items() if LONG in lengths} >= set(
        GOALS
    )


def test_rows_and_table(monkeypatch, tmp_path):
    case = Case(label="GLA", kind="gla", sizes=(2, 8, 16), peers={"fla naive": (16, LONG), "good loop": (16,)})
    times = {"chunked": 0.5, "fla naive": 15.0, "good loop": 1.0}
    monkeypatch.setattr(cpu_scan, "alone", lambda function, kind, form, tokens, sizes: (times[form], 2**20 * len(form)))
    record = Record({"load": 1.0}, out=tmp_path / "rows.json")
    cpu_scan.compare(case, (16, LONG), record)
    table = cpu_scan.render(json.loads((tmp_path / "rows.json").read_text())).splitlines()[4:]
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in table] == [
        ["GLA", "16", "500", "fla naive", "15000", "30x", "", "7", "9"],
        ["GLA", "16", "500", "good loop", "1000", "2x", "", "7", "9"],
        ["GLA", "4,096", "500", "fla naive", "15000", "30x", ">= 20x", "7", "9"],
    ]


def test_a_measurement_includes_the_backward_pass():
    seconds, taken = cpu_scan.timed("gla", OURS, 64, (2, 8, 16))
    assert seconds > 0
    assert taken >= 0
