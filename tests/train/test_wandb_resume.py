"""wandb's own files of runs that were killed and resumed: every step is there once, with the values that count."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import wandb
from wandb.proto import wandb_internal_pb2

from statex_dist import redact
from statex_dist.train.metrics import MetricsConfig
from statex_dist.train.wandb_files import read_records, segments, synced_marker
from statex_dist.train.wandb_run import WandbRun, _diff_holds_secret
from tests.runs import GLA, REPOSITORY, environment, make_shards, write_run
from tests.train.observed import Observed


def logged(path: Path) -> Iterator[tuple[int, float]]:
    """Step and loss of every record of a file's history."""
    for record in read_records(path):
        found = wandb_internal_pb2.Record.FromString(record.payload)
        if found.WhichOneof("record_type") == "history":
            values = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in found.history.item}
            yield found.history.step.num, values["loss"]


def history(run_dir: Path) -> list[tuple[int, float]]:
    """What ``wandb sync`` would send, in its order."""
    files = segments(run_dir, (run_dir / "wandb_id").read_text())
    assert files
    return [step for path in files if not synced_marker(path).exists() for step in logged(path)]


def live(run_dir: Path, begin: int, end: int, loss: float, project: str | None = "p") -> None:
    """One life of a run, which ends without a checkpoint of its last steps."""
    metrics = Observed(run_dir, MetricsConfig(wandb_project=project).build(flops_per_token=0), start_step=begin)
    for step in range(begin + 1, end + 1):
        figures = {"lr": 0.1, "grad_norm": 1.0, "tokens": 8, "seconds": 1.0, "tokens_per_s": 8.0, "time": {"data": 0.1}}
        metrics.write({"step": step, "loss": loss + step, **figures})
    metrics.close()
    wandb.teardown()  # the end of its service: its file is whole, and the next life's has another name
    time.sleep(1.1)


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def test_steps_that_are_trained_again_replace_those_of_the_lost_life(tmp_path: Path):
    live(tmp_path, 0, 6, 100.0)
    assert [step for step, _ in history(tmp_path)] == [1, 2, 3, 4, 5, 6]
    live(tmp_path, 4, 8, 200.0)
    assert history(tmp_path) == [(step, (100.0 if step <= 4 else 200.0) + step) for step in range(1, 9)]
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert history(tmp_path) == [(record["step"], record["loss"]) for record in records]
    # Sent records are final: their steps stay, and are not logged again.
    (first,) = [path for path in segments(tmp_path, (tmp_path / "wandb_id").read_text()) if 1 in dict(logged(path))]
    synced_marker(first).touch()
    live(tmp_path, 2, 9, 300.0)
    assert [step for step, _ in logged(first)] == [1, 2, 3, 4]
    assert history(tmp_path) == [(step, 300.0 + step) for step in range(5, 10)]


def test_torn_and_empty_files_of_a_kill(tmp_path: Path):
    live(tmp_path, 0, 6, 100.0)
    (path,) = segments(tmp_path, (tmp_path / "wandb_id").read_text())
    whole = path.read_bytes()
    for size in (len(whole) - 3, len(whole) // 2, 0):
        path.write_bytes(whole[:size])
        kept = [step for step, _ in logged(path)]
        assert kept == list(range(1, len(kept) + 1))
        live(tmp_path, 6, 7, 100.0)
        assert history(tmp_path) == [(step, 100.0 + step) for step in range(1, 8)]
        *_, last = segments(tmp_path, (tmp_path / "wandb_id").read_text())
        assert synced_marker(path).exists() == (size < 10), "wandb sync cannot read a file without its beginning"
        synced_marker(path).unlink(missing_ok=True)
        last.unlink()


def test_a_run_that_takes_up_wandb_later_has_its_steps_from_the_start(tmp_path: Path):
    live(tmp_path, 0, 3, 0.0, project=None)
    assert not (tmp_path / "wandb").exists()
    live(tmp_path, 3, 4, 0.0)
    assert history(tmp_path) == [(step, float(step)) for step in (1, 2, 3, 4)]


def test_a_start_with_wandb_switched_off_changes_nothing_there(tmp_path: Path, monkeypatch):
    live(tmp_path, 0, 3, 0.0)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    live(tmp_path, 3, 5, 0.0)
    assert [step for step, _ in history(tmp_path)] == [1, 2, 3]
    monkeypatch.setenv("WANDB_MODE", "dryrun")
    live(tmp_path, 4, 6, 0.0)
    assert history(tmp_path) == [(step, float(step)) for step in range(1, 7)]


def test_without_its_directory_or_id_it_has_every_step_again(tmp_path: Path):
    live(tmp_path, 0, 3, 0.0)
    shutil.rmtree(tmp_path / "wandb")
    live(tmp_path, 3, 4, 0.0)
    assert history(tmp_path) == [(step, float(step)) for step in (1, 2, 3, 4)]
    for damaged in (b"", b"\xff\x00", b"../x"):
        (tmp_path / "wandb_id").write_bytes(damaged)
        live(tmp_path, 4, 4, 0.0)
        assert history(tmp_path) == [(step, float(step)) for step in (1, 2, 3, 4)]


@pytest.mark.parametrize("fault", ["package", "mode"])
def test_a_training_goes_on_where_wandb_cannot_be_used(tmp_path: Path, monkeypatch, caplog, fault: str):
    if fault == "package":
        monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setenv("WANDB_MODE", "no such mode")
    with caplog.at_level("WARNING"):
        metrics = Observed(tmp_path, MetricsConfig(wandb_project="p").build(flops_per_token=0))
        figures = {"lr": 0.1, "grad_norm": 1.0, "tokens": 8, "seconds": 1.0, "tokens_per_s": 8.0, "time": {"data": 0.1}}
        metrics.write({"step": 1, "loss": 1.0, **figures})
        metrics.close()
    assert [record.message for record in caplog.records if "wandb cannot be used" in record.message]
    assert '"step": 1' in (tmp_path / "metrics.jsonl").read_text()


def test_online_the_server_says_where_to_go_on(tmp_path: Path):
    sent: list[int] = []
    run = object.__new__(WandbRun)
    run._failed, run._held = False, 0
    run._run = SimpleNamespace(starting_step=5, log=lambda values, step: sent.append(step))
    offline = tmp_path / "wandb" / "offline-run-20260101_000000-x" / "run-x.wandb"
    offline.parent.mkdir(parents=True)
    offline.write_bytes(b"")
    run._go_on([offline], "online", 6, [{"step": step} for step in range(1, 7)])
    for step in (7, 8):
        run.log({"step": step})
    assert sent == [5, 6, 7, 8]
    assert synced_marker(offline).exists()
    run._run.starting_step, sent[:] = 9, []
    run._go_on([], "online", 6, [])
    for step in (7, 8, 9):
        run.log({"step": step})
    assert sent == [9]


@pytest.mark.parametrize("kills", [(15,), pytest.param((20, 300, 330), marks=pytest.mark.slow)])
def test_a_training_process_that_is_killed_has_every_step_once(tmp_path: Path, kills: tuple[int, ...]):
    shards = make_shards(tmp_path / "data")
    end = kills[-1] + 10
    file = write_run(
        tmp_path / "run.yaml",
        model={"config": GLA},
        data={"path": str(shards), "seq_len": 64, "packs_per_step": 2},
        train={"num_steps": 5000, "save_every": 7},
        engine={"name": "plain"},
        schedule={"name": "constant"},
        metrics={"wandb_project": "p"},
    )
    command = [sys.executable, str(REPOSITORY / "launch" / "train.py"), "--config", str(file)]
    run_dir = tmp_path / "run"
    for steps in kills:
        with subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as run:
            deadline = time.monotonic() + 120
            while not _last(run_dir) >= steps:
                assert run.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.02)
            os.kill(run.pid, signal.SIGKILL)
    last = [*command, "--train.num_steps", str(max(end, _last(run_dir) + 3))]
    done = subprocess.run(last, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]
    assert history(run_dir) == [(record["step"], pytest.approx(record["loss"])) for record in records]
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))


def _last(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def test_changes_of_the_working_tree_that_hold_a_secret_are_kept_from_wandb(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(redact, "_secrets", {})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    redact.remember("http://user:pa55word@host/a")
    file = tmp_path / "run.yaml"
    file.write_text("path: /data\n")
    for command in ("init -q", "add run.yaml", "-c user.email=a@b -c user.name=n commit -qm x"):
        subprocess.run(["git", *command.split()], check=True)
    assert not _diff_holds_secret()
    file.write_text("path: http://user:pa55word@host/a\n")
    assert _diff_holds_secret()
