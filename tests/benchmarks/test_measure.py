"""Clocks, tables and limits that all benchmarks share."""

import json
import sys
import time

import pytest
import torch

from benchmarks import measure
from benchmarks.measure import Ceilings, Record, Timing, figure, markdown, run_limited, time_cpu


def test_a_timing_is_the_median_and_the_least():
    assert Timing.of([3.0, 1.0, 2.0, 9.0]) == Timing(2.5, 1.0, 4)


@pytest.mark.parametrize(("seconds", "calls"), [(0.001, 6), (2.0, 3), (100.0, 2)])
def test_calls_are_repeated_within_the_budget(monkeypatch, seconds, calls):
    """One call warms up, then up to five are timed, one at least."""
    clock, count = [0.0], []
    monkeypatch.setattr(measure.time, "process_time", lambda: clock[0])

    def call():
        count.append(1)
        clock[0] += seconds

    timing = time_cpu(call, budget=5.0)
    assert len(count) == calls
    assert timing.runs == calls - 1
    assert timing.median == pytest.approx(seconds)


def test_a_record_is_on_disk_after_every_row(tmp_path):
    out = tmp_path / "rows.json"
    record = Record({"torch": "2"}, Ceilings(product_flops=1e12, copy_bytes=2e9), out=out, settings={"packs": 1})
    record.add({"tokens": 1})
    assert [row["tokens"] for row in json.loads(out.read_text())["rows"]] == [1]
    record.add({"tokens": 2})
    document = json.loads(out.read_text())
    assert document == record.document()
    assert measure.heading(document) == "torch 2; measured ceilings: product 1 TFLOP/s, copy 2 GB/s"


def test_ceilings_count_both_directions_of_a_copy(monkeypatch):
    monkeypatch.setattr(measure, "_CPU_PRODUCT", 64)
    monkeypatch.setattr(measure, "_CPU_COPY_BYTES", 1000)
    monkeypatch.setattr(measure, "time_call", lambda call, device: (call(), Timing(9.0, 0.5, 1))[1])
    ceilings = Ceilings.measure(torch.device("cpu"))
    assert ceilings == Ceilings(product_flops=2 * 64**3 / 0.5, copy_bytes=2 * 1000 / 0.5)


def test_a_table_is_markdown_and_aligned():
    lines = markdown(("a", "long name"), [(1, None), ("wide cell", 2.5)]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in lines] == [
        ["a", "long name"],
        ["---------", "---------"],
        ["1", ""],
        ["wide cell", "2.5"],
    ]


@pytest.mark.parametrize(
    ("value", "scale", "text"), [(None, 1, None), (0.0012345, 1e3, "1.23"), (12345.6, 1, "12346"), (999.6, 1, "1e+03")]
)
def test_figures_have_three_digits(value, scale, text):
    assert figure(value, scale) == text


def test_a_command_that_runs_too_long_is_stopped_with_its_children(tmp_path):
    log = tmp_path / "log"
    child = "import time\nfor _ in range(300): print('alive', flush=True); time.sleep(0.1)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert run_limited([sys.executable, "-c", parent], 3, log=log) == "stopped after 3 s"
    size = log.stat().st_size
    assert size > 0
    time.sleep(1)
    assert log.stat().st_size == size, "the child goes on"


@pytest.mark.parametrize(("code", "outcome"), [(0, None), (3, "exit code 3")])
def test_how_a_command_ended(tmp_path, code, outcome):
    assert run_limited([sys.executable, "-c", f"raise SystemExit({code})"], 60, log=tmp_path / "log") == outcome
