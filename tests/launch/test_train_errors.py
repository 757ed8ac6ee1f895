"""What the training script says where the system refuses: one line, in ``status.json`` too."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest

import statex_dist.run
from launch.train import main
from statex_dist.train.status import read_status
from tests.checkpoints_tools.expand.test_expand_faults import mounted
from tests.runs import GLA, make_shards, write_run


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
    assert "; " in line or number == "ENOENT", "a remedy"
    if not named and number in ("ENOSPC", "EROFS", "EDQUOT"):
        assert str(run_dir) in line
    status = read_status(run_dir)
    assert status is not None
    assert (status.state, status.exit_code) == ("failed", 1)
    assert f"error: {status.message}" == line


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
