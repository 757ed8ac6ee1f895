"""A run's status file, and which of its claims are believed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from statex_dist.errors import StateXError
from statex_dist.train.status import ATTEMPT_VARIABLE, RunStatus, read_status, this_job, write_failure, write_status
from tests.raising import raises


def fail(run_dir: Path, message: str, exit_code: int = 1, step: int | None = None) -> RunStatus:
    write_failure(run_dir, message, exit_code=exit_code, world_size=2, step=step)
    status = read_status(run_dir)
    assert status is not None
    return status


def test_a_status_comes_back(tmp_path: Path, monkeypatch):
    assert read_status(tmp_path) is None
    monkeypatch.setenv(ATTEMPT_VARIABLE, "run-1")
    written = RunStatus(state="running", step=3, world_size=2)
    write_status(tmp_path, written)
    assert read_status(tmp_path) == written
    assert (written.attempt, written.time[:2]) == ("run-1", "20")
    write_status(tmp_path, RunStatus(state="preempted", step=5, world_size=2, exit_code=75))
    status = read_status(tmp_path)
    assert status is not None
    assert (status.state, status.step, status.exit_code) == ("preempted", 5, 75)
    assert [p.name for p in tmp_path.iterdir()] == ["status.json"]


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", '{"state": "asleep", "step": 1, "world_size": 1}', '{"state": "failed", "step": "1"}', "7"]
)
def test_an_unreadable_status_is_named(tmp_path: Path, text: str):
    (tmp_path / "status.json").write_text(text)
    with raises(StateXError, "status.json", "delete it") as caught:
        read_status(tmp_path)
    assert "\n" not in str(caught.value)


def test_the_first_failure_of_a_start_is_its_cause(tmp_path: Path, monkeypatch):
    monkeypatch.setenv(ATTEMPT_VARIABLE, "run-1")
    write_status(tmp_path, RunStatus(state="running", step=0, world_size=2))
    assert fail(tmp_path, "shard 3 is damaged", 2, step=4).message == "shard 3 is damaged"
    assert fail(tmp_path, "connection closed by peer").message == "shard 3 is damaged"
    monkeypatch.setenv(ATTEMPT_VARIABLE, "run-2")
    status = fail(tmp_path, "no such model", 2)
    assert (status.message, status.exit_code, status.step, status.attempt) == ("no such model", 2, None, "run-2")


def test_what_goes_wrong_after_the_end_is_no_failure_of_the_run(tmp_path: Path, monkeypatch):
    monkeypatch.setenv(ATTEMPT_VARIABLE, "run-1")
    write_status(tmp_path, RunStatus(state="complete", step=9, world_size=2))
    assert fail(tmp_path, "peer gone while closing").state == "complete"


def test_without_a_supervisor_a_start_is_told_by_its_time(tmp_path: Path, monkeypatch):
    monkeypatch.delenv(ATTEMPT_VARIABLE, raising=False)
    assert fail(tmp_path, "the cause").message == "the cause"
    assert fail(tmp_path, "connection closed by peer").message == "the cause"
    write_status(tmp_path, RunStatus(state="complete", step=9, world_size=2))
    write_failure(tmp_path, "killed at its exit", exit_code=1, world_size=2)
    assert read_status(tmp_path).state == "complete"
    monkeypatch.setattr("statex_dist.train.status._BEGAN", "2999-01-01T00:00:00+00:00")
    assert fail(tmp_path, "of the next start").message == "of the next start"


def test_starts_of_torchrun_have_one_name_and_are_told_apart_by_time(tmp_path: Path, monkeypatch):
    monkeypatch.setenv(ATTEMPT_VARIABLE, "slurm-7-0")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert this_job() == "slurm-7"
    assert fail(tmp_path, "the cause").message == "the cause"
    assert fail(tmp_path, "connection closed by peer").message == "the cause"
    monkeypatch.setattr("statex_dist.train.status._BEGAN", "2999-01-01T00:00:00+00:00")
    assert fail(tmp_path, "of the next start").message == "of the next start"


def test_a_failure_leaves_no_directory_and_hides_no_error(tmp_path: Path, caplog):
    write_failure(tmp_path / "run", "refused", exit_code=2, world_size=1)
    assert not (tmp_path / "run").exists()
    (tmp_path / "status.json").mkdir()
    write_failure(tmp_path, "the real cause", exit_code=1, world_size=1)
    assert "status.json was not written" in caplog.text


def test_ranks_that_fail_at_once_do_not_disturb_each_other(tmp_path: Path):
    program = (
        "import sys; from pathlib import Path; from statex_dist.train.status import *\n"
        "for n in range(50): write_status(Path(sys.argv[1]), RunStatus(state='failed', step=n, world_size=2))"
    )
    environment = {**os.environ, ATTEMPT_VARIABLE: "run-1"}
    ranks = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], env=environment) for _ in range(2)]
    assert [rank.wait(timeout=60) for rank in ranks] == [0, 0]
    assert json.loads((tmp_path / "status.json").read_text())["step"] == 49
    assert [p.name for p in tmp_path.iterdir()] == ["status.json"]
