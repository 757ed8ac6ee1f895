"""A session's parts: order, limits, and the results of a part that was stopped."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import all as session
from benchmarks.gpu.all import PARTS, Part

WRITE = "import pathlib, sys; pathlib.Path(sys.argv[-1]).write_text('{\"rows\": [' + sys.argv[1] + ']}')"
WRITE_AND_HANG = WRITE + "; import time; time.sleep(60)"


def part(code: str, *arguments: str, limit: float = 60, rendered: bool = True) -> Part:
    render = (lambda document: f"rows {document['rows']}") if rendered else None
    return Part(title=f"Part {arguments}", command=("-c", code, *arguments), limit=limit, render=render)


def test_a_stopped_part_keeps_its_rows_and_the_others_go_on(monkeypatch, tmp_path):
    parts = {
        "tests": part("print('first' + 'line'); print(3, 'passed')", rendered=False),
        "bad": part("raise SystemExit(2)"),
        "slow": part(WRITE_AND_HANG, "1", limit=6),
        "good": part(WRITE, "2"),
    }
    monkeypatch.setattr(session, "PARTS", parts)
    outcomes = session.run_parts(list(parts), "cuda", tmp_path, seconds=100)
    assert [outcome.split(",")[0] for outcome in outcomes.values()] == [
        *("complete", "exit code 2", "stopped after 6 s", "complete")
    ]
    text = (tmp_path / "results.md").read_text()
    assert "3 passed" in text
    assert "firstline" not in text
    assert text.index("exit code 2") < text.index("rows [1]") < text.index("rows [2]")


def test_what_no_time_is_left_for_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(session, "PARTS", {"a": part("import time; time.sleep(60)"), "b": part(WRITE, "2")})
    outcomes = session.run_parts(["a", "b"], "cuda", tmp_path, seconds=3)
    assert outcomes["a"].startswith("stopped after 3 s")
    assert outcomes["b"] == "not run: the time was used up"


def test_the_exit_code_says_whether_all_parts_ended_well(monkeypatch, tmp_path, capsys):
    def run_parts(names, device, out, seconds):
        (out / "results.md").write_text("tables")
        return {"scan": "complete, 3 s", "model": "exit code 1, 2 s"}

    monkeypatch.setattr(session, "run_parts", run_parts)
    assert session.main(["--out", str(tmp_path)]) == 1
    assert "tables" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):  # another session's results are not mixed with these
        session.main(["--out", str(tmp_path)])
    assert "results already" in capsys.readouterr().err


def test_a_part_that_had_no_time_is_in_the_results(tmp_path):
    assert session.run_parts(["tests", "scan"], "cpu", tmp_path, 0) == dict.fromkeys(
        ("tests", "scan"), "not run: the time was used up"
    )
    assert (tmp_path / "results.md").read_text().count("not run: the time was used up") == 2


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("name", [name for name in PARTS if name != "tests"])
def test_every_part_is_a_command_that_its_module_takes(monkeypatch, tmp_path, name, device):
    """Each module parses its part's options, up to the point where it would begin to measure."""
    command = session.command_of(name, device, tmp_path)
    assert command[:2] == [sys.executable, "-m"]
    module = sys.modules[command[2]]

    class BeginsError(Exception):
        pass

    def begin(*_, **__):
        raise BeginsError

    monkeypatch.setattr(module, "Record", begin)
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(module, "machine", lambda *_: {})
    if hasattr(module, "Ceilings"):
        monkeypatch.setattr(module.Ceilings, "measure", lambda *_: None)
    with pytest.raises(BeginsError):
        module.main(command[3:])


def test_all_parts_fit_a_session():
    """The most important come first, and what fits into 15 minutes is all but the last."""
    names = list(PARTS)
    assert names[:4] == ["tests", "scan", "model", "decode"]
    assert sum(PARTS[name].limit for name in names[:-1]) <= 14 * 60


@pytest.mark.slow
def test_a_part_of_a_cpu_session(tmp_path):
    """One part for real, as a process."""
    assert session.run_parts(["decode"], "cpu", tmp_path, seconds=200)["decode"].startswith("complete")
    assert len(json.loads((tmp_path / "decode.json").read_text())["rows"]) == 10
    assert "| GLA tiny" in (tmp_path / "results.md").read_text()
    assert {path.name for path in Path(tmp_path).iterdir()} == {"decode.json", "log.txt", "results.md"}
