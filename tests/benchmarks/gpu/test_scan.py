"""The scans' command at small sizes, and what becomes of a path that fails."""

import dataclasses
import json

import pytest
import torch

from benchmarks.gpu import scan
from benchmarks.gpu.paths import TINY, batched_path
from benchmarks.measure import Ceilings, Record

CPU = torch.device("cpu")
CEILINGS = Ceilings(product_flops=1e12, copy_bytes=1e12)


def test_the_command_runs_on_a_cpu(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(scan, "PARITY_TOKENS", 200)
    out = tmp_path / "scan.json"
    assert scan.main(["--device", "cpu", "--tokens", "100", "--budget", "0.01", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    document = json.loads(out.read_text())
    assert printed.strip() == scan.render(document)
    speeds = [row for row in document["rows"] if row["kind"] == "speed"]
    assert len(speeds) == 10
    for row in speeds:
        assert row.get("failed") == (None if row["path"].startswith("ours") else "needs CUDA")
    errors = [row for row in document["rows"] if "errors" in row]
    assert [set(row["errors"]) for row in errors] == [
        {"out", "dq", "dk", "dv", "dg"},
        {"out", "dq", "dk", "dv", "dg", "dmix"},
        {"out", "dq", "dk", "dv", "dg"},
        {"out", "dq", "dk", "dv", "dg", "dgain"},
        {"out", "dx", "ddt", "dA", "dB", "dC"},
    ]
    assert all(error <= row["tolerances"][name] for row in errors for name, error in row["errors"].items())
    assert "Goals, merged head, 65,536 tokens: authors' time / ours not measured" in printed


def test_the_sweep_runs_on_a_cpu(monkeypatch, capsys):
    monkeypatch.setattr(scan, "SWEEP_CHUNKS", (16, 32))
    monkeypatch.setattr(scan, "SWEEP_STATES", (1,))
    monkeypatch.setattr(Ceilings, "measure", lambda _: CEILINGS)
    assert scan.main(["--device", "cpu", "--sweep", "--tokens", "40", "--budget", "0.01"]) == 0
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ours")]
    assert len(table) == 2 * 2 * 1


def test_a_wrong_path_is_seen():
    path = batched_path(TINY)
    good = scan.parity(path, CPU)
    assert all(error <= good["tolerances"][name] for name, error in good["errors"].items())
    wrong = dataclasses.replace(path, scan=lambda x: path.scan(x | {"v": x["v"] * 1.001}))
    found = scan.parity(wrong, CPU)
    assert found["errors"]["out"] == pytest.approx(1e-3, rel=0.1)
    row = {"path": "p", "kind": "parity", **found}
    assert "out 1.0e-03*" in scan.render({"machine": {}, "ceilings": None, "rows": [row]})


def test_a_path_that_fails_is_a_row_and_not_the_end():
    path = batched_path(TINY)

    def fail(_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")

    record = Record({}, CEILINGS)
    paths = [dataclasses.replace(path, name="bad", scan=fail), path]
    scan.compare(paths, [20], CPU, record, budget=0.001, check=False)
    assert record.rows[0]["failed"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate"
    assert record.rows[1]["both_s"] > 0
    assert "OutOfMemoryError" in scan.render(record.document())


def test_ratios_are_against_the_same_length():
    common = {"kind": "speed", "family": "gla", "forward_s": 1.0, "both_least_s": 1.0, "peak_bytes": None}

    def row(role, tokens, seconds, states):
        figures = {
            "both_s": seconds,
            "state_bytes": states,
            "roofline_s": 1.0,
            "flops_per_s": 1e11,
            "bytes_per_s": 1e11,
        }
        return {"path": role, "role": role, "tokens": tokens, **common, **figures}

    rows = [row("ours", 65536, 2.0, 2**30), row("authors", 65536, 8.0, 2**34), row("original", 65536, 1.0, 2**28)]
    rows.append(row("authors", 4096, 100.0, 1))
    text = scan.render({"machine": {}, "ceilings": dataclasses.asdict(CEILINGS), "rows": rows})
    ours = next(line for line in text.splitlines() if line.startswith("| ours"))
    assert [cell.strip() for cell in ours.strip("|").split("|")][5:] == [
        *("1", "0.1", "10 %", "10 %", "50 %", "4", "0.0625", "2")
    ]
    assert "authors' time / ours 4.00 (>= 3)" in text
    assert "our chunk states / authors' 1/16.0 (<= 1/8), of roofline 50 %" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_without_a_gpu_it_says_so(capsys):
    assert scan.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err
