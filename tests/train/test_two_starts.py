"""A second start of a run that another process trains: refused, and nothing of the first one is touched."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from statex_dist.errors import ConfigError
from statex_dist.train.run_lock import LOCK_NAME, claim, not_held, wait_for_own_job
from statex_dist.train.status import read_status
from tests.runs import GLA, REPOSITORY, environment, make_shards, write_run

TINY = {**GLA, "hidden_size": 16, "num_hidden_layers": 1, "num_heads": 2, "intermediate_size": 16}


def start(file: Path, *arguments: str, **options) -> subprocess.Popen[str]:
    command = [sys.executable, str(REPOSITORY / "launch" / "train.py"), "--config", str(file), *arguments]
    return subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True, **options)


def test_a_start_that_is_refused_leaves_the_live_run_alone(tmp_path: Path):
    sections = {
        "model": {"config": TINY},
        "data": {"path": str(make_shards(tmp_path / "data")), "seq_len": 64, "packs_per_step": 1},
        "engine": {"name": "plain"},
        "train": {"num_steps": 1_000_000},
    }
    file = write_run(tmp_path / "run.yaml", **sections)
    run = tmp_path / "run"
    live = start(file)
    try:
        deadline = time.monotonic() + 240
        while not ((run / "metrics.jsonl").is_file() and (run / "metrics.jsonl").stat().st_size):
            assert live.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        before = (run / "status.json").read_text()
        assert json.loads(before)["state"] == "running"
        # One is refused for the lock, the other for its settings, before it looks at the lock.
        seconds = [start(file), start(file, "--engine.precision", "fp32", "--data.packs_per_step", "0")]
        for second, words in zip(seconds, ["another process is training into it", "packs_per_step"], strict=True):
            _, said = second.communicate(timeout=240)
            assert second.returncode == 2
            assert said.count("error: ") == 1
            assert words in said.split("error: ")[1]
        assert (run / "status.json").read_text() == before
        assert live.poll() is None
    finally:
        live.send_signal(signal.SIGTERM)
        live.communicate(timeout=240)
    assert live.returncode == 75
    status = read_status(run)
    assert status is not None
    assert status.state == "preempted"
    refused = start(file, "--data.path", str(tmp_path / "nowhere"))
    refused.communicate(timeout=240)
    status = read_status(run)
    assert status is not None
    assert (status.state, status.exit_code) == ("failed", 2), "no process holds the run: the failure is its news"


def test_looking_at_a_lock_makes_nothing_and_refuses_nobody(tmp_path: Path):
    with not_held(tmp_path) as free:
        assert free
    with not_held(tmp_path / "none") as free:
        assert free
    assert list(tmp_path.iterdir()) == []
    with claim(tmp_path), not_held(tmp_path) as free:
        assert not free
    with not_held(tmp_path) as one, not_held(tmp_path) as other:
        assert one
        assert other
        with pytest.raises(ConfigError, match="another process is training"), claim(tmp_path):
            pass
    with claim(tmp_path):
        assert (tmp_path / LOCK_NAME).is_file()


@pytest.mark.parametrize(("holder", "waits"), [("slurm-7-1", True), ("slurm-8-0", False)])
def test_only_an_earlier_start_of_the_same_job_is_waited_for(tmp_path: Path, monkeypatch, caplog, holder, waits):
    script = (
        "import sys; from pathlib import Path; from statex_dist.train.run_lock import claim\n"
        "with claim(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    environ = {**environment(), "STATEX_ATTEMPT": holder}
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, env=environ, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as cut_off:
        assert cut_off.stdout is not None
        assert cut_off.stdout.readline() == "held\n"
        monkeypatch.setenv("STATEX_ATTEMPT", "slurm-7-0")
        wait_for_own_job(tmp_path, seconds=0.1)
        assert ("waiting for its end" in caplog.text) == waits
        with pytest.raises(ConfigError, match="another process is training into it"):
            claim(tmp_path)
        if waits:
            ending = threading.Timer(0.5, cut_off.kill)
            ending.start()
            wait_for_own_job(tmp_path, seconds=60)
            claim(tmp_path).release()
        cut_off.kill()
