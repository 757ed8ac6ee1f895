"""The training script reports errors of the system in one line, in ``status.json`` too."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from pathlib import Path

import pytest

import statex_dist.run
from launch.train import main
from statex_dist.train.run_lock import claim
from statex_dist.train.status import RunStatus, read_status, write_status
from tests.checkpoints_tools.expand.test_expand_faults import mounted
from tests.runs import GLA, make_shards, run_training, write_run


@pytest.fixture
def config(tmp_path: Path) -> str:
    shards = make_shards(tmp_path / "data", num_documents=4)
    file = write_run(
        tmp_path / "job.yaml",
        model={"config": GLA},
        data={"path": str(shards), "seq_len": 64, "packs_per_step": 1},
        engine={"name": "plain"},
        train={"num_steps": 1},
    )
    return f"--config={file}"


@pytest.mark.parametrize("number", ["ENOSPC", "EROFS", "EACCES", "ESTALE", "EMFILE", "EIO", "EDQUOT", "ENOENT"])
@pytest.mark.parametrize("named", [True, False])
def test_a_refusal_of_the_system_is_one_line(tmp_path: Path, config, monkeypatch, capsys, number: str, named: bool):
    code = getattr(errno, number)

    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code), "/mnt/a/file") if named else OSError(code, os.strerror(code))

    monkeypatch.setattr(statex_dist.run, "train", refuse)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    assert main([config, "--run_dir", str(run_dir)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert os.strerror(code) in line
    assert ("/mnt/a/file" in line) == named
    assert "; " in line or number == "ENOENT", "no advice"
    if not named and number in ("ENOSPC", "EROFS", "EDQUOT"):
        assert str(run_dir) in line
    status = read_status(run_dir)
    assert status is not None
    assert (status.state, status.exit_code) == ("failed", 1)
    assert f"error: {status.message}" == line


def test_a_refused_second_start_leaves_the_status_of_the_living_run(tmp_path: Path, config, capsys):
    run_dir = tmp_path / "run"
    with claim(run_dir):
        write_status(run_dir, RunStatus(state="running", step=3, world_size=1))
        before = read_status(run_dir)
        assert main([config, "--run_dir", str(run_dir)]) == 2
        assert "another process" in capsys.readouterr().err
        assert read_status(run_dir) == before


def test_an_error_that_is_ours_keeps_its_traceback(tmp_path: Path, config, monkeypatch):
    def fail(*_: object) -> None:
        raise ConnectionError("no number: not of the system")

    monkeypatch.setattr(statex_dist.run, "train", fail)
    with pytest.raises(ConnectionError):
        main([config])


@pytest.mark.parametrize("place", ["ro", "file", "under a file", "long"])
def test_a_run_directory_that_cannot_be_made(tmp_path: Path, config, capsys, place: str):
    disk = tmp_path / "disk"
    (tmp_path / "file").write_text("")
    run_dir = {"ro": disk / "run", "file": tmp_path / "file", "long": tmp_path / ("x" * 300)}.get(
        place, tmp_path / "file" / "run"
    )
    if place == "ro":
        mounted(disk, "ro")
    try:
        code = main([config, "--run_dir", str(run_dir)])
    finally:
        if place == "ro":
            subprocess.run(["umount", str(disk)], check=True)
    line = capsys.readouterr().err.splitlines()[-1]
    assert code in (1, 2)
    assert line.startswith("error: ")
    assert str(run_dir)[:100] in line
    assert "[Errno" not in line


@pytest.mark.distributed
@pytest.mark.parametrize("wrong", ["data", pytest.param("taken", marks=pytest.mark.slow)])
def test_what_all_ranks_have_to_say_is_one_line_of_rank_0(tmp_path: Path, wrong: str):
    data = tmp_path / "nowhere" if wrong == "data" else make_shards(tmp_path / "data")
    file = write_run(tmp_path / "run.yaml", model={"config": GLA}, data={"path": str(data)})
    with claim(tmp_path / "run") if wrong == "taken" else contextlib.nullcontext():
        result = run_training(2, "--config", str(file))
    lines = [line for line in result.stderr.splitlines() if "error: " in line]
    assert [line[:7] for line in lines] == ["error: "], result.stderr
    assert {"data": str(data), "taken": "another process is training into it"}[wrong] in lines[0]
    assert "Traceback" not in result.stderr.split(lines[0])[0]
    assert not (tmp_path / "run" / "status.json").exists()
