"""What `statex status` reads from a run's files: states, progress, damaged files; no torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launch.cli import main
from statex_dist.durable.lock import acquire
from statex_dist.errors import DataError
from statex_dist.train.run_lock import LOCK_NAME
from statex_dist.train.run_view import DEAD_SECONDS, view_run
from statex_dist.train.status import RunStatus, write_status

PHASE = {"min": 0.1, "median": 0.2, "max": 0.9, "rank": 3, "host": "node7"}
STRAGGLER = {"rank": 3, "host": "node7", "phase": "data", "factor": 4.5}


def record(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "loss": 2.5, "tokens": 600, "seconds": 2.0, **more}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Return the directory of a run that says it is running, at step 40 of 100."""
    (tmp_path / "config.yaml").write_text("train: {num_steps: 100}\n")
    records = [record(1, seconds=100.0), *(record(step) for step in range(2, 40))]
    records.append(record(40, eval={"loss": 2.25}, ranks={"data": PHASE}, stragglers=[STRAGGLER]))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + '{"step": 41, "lo')
    (tmp_path / "checkpoints" / "global_step30").mkdir(parents=True)
    (tmp_path / "checkpoints" / "global_step30" / "MANIFEST.json").write_text("{}")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank3.log").write_text(
        "2026-01-01 00:00:01 INFO fine\n2026-01-01 00:00:03 WARNING slow disk\n  a second line\n"
    )
    (tmp_path / "logs" / "rank0.log").write_text("2026-01-01 00:00:02 ERROR no disk\n")
    write_status(tmp_path, RunStatus(state="running", step=0, world_size=4, starts=2))
    return tmp_path


def age(run_dir: Path, seconds: float = DEAD_SECONDS + 60) -> None:
    then = time.time() - seconds
    for path in run_dir.rglob("*"):
        os.utime(path, (then, then))


def test_a_running_run_shows_progress_phases_and_warnings(run_dir: Path, capsys: pytest.CaptureFixture[str]):
    with acquire(run_dir / LOCK_NAME, holder="statex"):
        view = view_run(run_dir)
        assert main(["status", str(run_dir)]) == 0
    assert (view.state, view.step, view.num_steps, view.ranks, view.starts) == ("running", 40, 100, 4, 2)
    assert (view.loss, view.eval_loss, view.step_seconds, view.tokens_per_s) == (2.5, 2.25, 2.0, 300.0)
    assert view.eta_seconds == 120.0
    assert (view.checkpoint, view.checkpoint_step) == ("global_step30", 30)
    assert (view.phases, view.phases_step, view.stragglers) == ({"data": PHASE}, 40, [STRAGGLER])
    assert [(row["rank"], row["text"]) for row in view.last_log] == [(0, "no disk"), (3, "slow disk")]
    assert view.notes == []
    out = capsys.readouterr().out
    for text in ("running on 4 ranks", "step 40/100", "ETA 2 min 0 s", "global_step30", "node7 (rank 3)", "slow disk"):
        assert text in out


def test_a_run_without_its_process_is_dead(run_dir: Path, capsys: pytest.CaptureFixture[str]):
    acquire(run_dir / LOCK_NAME, holder="statex").release()
    assert view_run(run_dir).state == "dead", "its lock names this host, and is free"
    (run_dir / LOCK_NAME).write_text("statex (process 12 on another-host)")
    assert view_run(run_dir).state == "running", "that host's locks may not be seen here"
    age(run_dir)
    view = view_run(run_dir)
    assert (view.state, view.eta_seconds) == ("dead", None)
    assert main(["status", str(run_dir)]) == 1
    assert "dead" in capsys.readouterr().out


def test_a_run_that_is_held_and_writes_nothing_is_silent(run_dir: Path):
    with acquire(run_dir / LOCK_NAME, holder="statex"):
        age(run_dir)
        assert view_run(run_dir).state == "silent"
        assert main(["status", str(run_dir)]) == 1


@pytest.mark.parametrize(
    ("state", "shown", "code"), [("preempted", "stopped", 0), ("complete", "complete", 0), ("failed", "failed", 1)]
)
def test_an_ended_run_says_how(run_dir: Path, capsys: pytest.CaptureFixture[str], state: Any, shown: str, code: int):
    write_status(run_dir, RunStatus(state=state, step=40, world_size=4, message="no disk" if code else ""))
    age(run_dir)
    assert main(["status", str(run_dir), "--json"]) == code
    facts = json.loads(capsys.readouterr().out)
    assert (facts["state"], facts["step"], facts["eta_seconds"]) == (shown, 40, None)


def test_a_run_that_has_only_its_lock_is_starting(tmp_path: Path):
    with acquire(tmp_path / LOCK_NAME, holder="statex"):
        assert view_run(tmp_path).state == "starting"


@pytest.mark.parametrize("name", ["status.json", "metrics.jsonl", "config.yaml"])
@pytest.mark.parametrize("content", [b"\xff\xfe[\n", b'{"step": []}\n', b"", b"[[[[\n", b"null\n"])
def test_damaged_files_are_notes(run_dir: Path, name: str, content: bytes):
    (run_dir / name).write_bytes(content)
    view = view_run(run_dir)
    assert view.notes or content == b""
    assert main(["status", str(run_dir)]) in (0, 1)


def test_records_of_another_form_are_shown_as_far_as_they_go(run_dir: Path, capsys: pytest.CaptureFixture[str]):
    odd = {"step": 50, "loss": "x", "eval": 3, "ranks": {"data": {"max": None}}, "stragglers": [{}, 3], "seconds": None}
    with (run_dir / "metrics.jsonl").open("w") as file:
        file.write(json.dumps(odd) + "\n")
    assert view_run(run_dir).loss is None
    assert main(["status", str(run_dir)]) in (0, 1)
    assert "step 50/100" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["missing", "empty", "file"])
def test_what_is_no_run_is_refused(tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / what
    path.mkdir() if what == "empty" else path.touch() if what == "file" else None
    with pytest.raises(DataError):
        view_run(path)
    assert main(["status", str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_only_the_ends_of_large_files_are_read(run_dir: Path):
    line = json.dumps(record(7, filler="x" * 1000)) + "\n"
    (run_dir / "metrics.jsonl").write_text(line * 5000 + json.dumps(record(90)) + "\n")
    view = view_run(run_dir)
    assert (view.step, view.notes) == (90, [])


def test_torch_is_not_imported(run_dir: Path):
    program = (
        "import sys; from launch.cli import main; code = main(['status', sys.argv[1]]); "
        "sys.exit(9 if 'torch' in sys.modules or 'numpy' in sys.modules else code)"
    )
    assert subprocess.run([sys.executable, "-c", program, str(run_dir)], check=False).returncode == 0
