"""Seconds of all ranks and stragglers: of arrays, and of real gloo ranks of which one is slow."""

from __future__ import annotations

import json
import logging
import socket
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch

from statex_dist.errors import ConfigError
from statex_dist.train.fleet import INTERVALS, PHASES, Stragglers, summarise
from statex_dist.train.metrics import MetricsConfig, read_metrics
from statex_dist.train.run_view import view_run
from tests.runs import GLA, make_shards, run_training, write_run

HOSTS = [f"node{rank // 2}" for rank in range(6)]


def table(ranks: int = 6, **slow: tuple[int, float]) -> torch.Tensor:
    """Return the seconds of ranks that are alike but for one each in some phases; a step takes a second."""
    values = torch.full((ranks, len(PHASES) + 1), 0.1, dtype=torch.float64)
    values[:, -1] = 1.0
    for phase, (rank, seconds) in slow.items():
        values[rank, PHASES.index(phase)] = seconds
    return values


def names(found: list[dict[str, Any]]) -> list[tuple[int, str, str]]:
    return [(row["rank"], row["host"], row["phase"]) for row in found]


def test_the_summary_names_the_slowest_host_and_the_rank_that_waits_least():
    found = summarise(table(forward=(4, 0.3), wait=(2, 0.01)), HOSTS)
    assert found["forward"] == {"min": 0.1, "median": 0.1, "max": 0.3, "rank": 4, "host": "node2"}
    assert (found["wait"]["rank"], found["wait"]["host"]) == (2, "node1")
    values = table()
    values[:, PHASES.index("save")] = 0.0
    assert "save" not in summarise(values, HOSTS)


def test_a_straggler_is_named_after_some_intervals_and_once(caplog: pytest.LogCaptureFixture):
    stragglers = Stragglers(1.5)
    with caplog.at_level(logging.INFO, "statex_dist"):
        for _ in range(INTERVALS - 1):
            assert stragglers.update(table(data=(3, 0.4), busy=(3, 0.9)), HOSTS) == []
        for _ in range(3):
            found = stragglers.update(table(data=(3, 0.4), busy=(3, 0.9)), HOSTS)
            assert names(found) == [(3, "node1", "data")], "data explains why it is busy"
            assert found[0]["factor"] == pytest.approx(4.0)
        assert found[0]["intervals"] == INTERVALS + 2
        assert stragglers.update(table(), HOSTS) == []
    levels = [record.levelname for record in caplog.records]
    assert levels == ["WARNING", "INFO"]


@pytest.mark.parametrize(
    ("factor", "slow"),
    [
        (0.0, {"data": (1, 0.9)}),  # no warnings wanted
        (5.0, {"data": (1, 0.4)}),
        (1.5, {"data": (1, 0.19)}),  # not enough of a step
        (1.5, {"forward": (1, 0.9), "wait": (1, 0.9), "save": (1, 0.9)}),  # includes what others do
    ],
)
def test_ranks_that_are_not_named(factor: float, slow: dict[str, tuple[int, float]]):
    stragglers = Stragglers(factor)
    assert [stragglers.update(table(**slow), HOSTS) for _ in range(INTERVALS + 1)] == [[]] * (INTERVALS + 1)


def test_a_slow_device_is_named_however_short_its_probe_is():
    stragglers = Stragglers(1.5)
    values = table(forward=(0, 0.5))
    values[:, PHASES.index("probe")] = 0.001
    values[4, PHASES.index("probe")] = 0.002
    found = [stragglers.update(values, HOSTS) for _ in range(INTERVALS)][-1]
    assert names(found) == [(4, "node2", "probe")]


def test_a_median_of_zero_gives_a_number():
    values = table()
    values[:, PHASES.index("callbacks")] = 0.0
    values[2, PHASES.index("callbacks")] = 0.5
    stragglers = Stragglers(1.5)
    found = [stragglers.update(values, HOSTS) for _ in range(INTERVALS)][-1]
    assert names(found) == [(2, "node1", "callbacks")]
    assert json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("factor", [1.0, 0.5, -1.0, float("nan"), float("inf")])
def test_a_factor_that_tells_nothing_is_refused(factor: float):
    with pytest.raises(ConfigError):
        MetricsConfig(straggler_factor=factor)


@pytest.fixture(scope="module")
def slow_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CompletedProcess[str]]:
    """Return the directory of a run of three ranks, of which rank 1 sleeps before each step, and its end."""
    directory = tmp_path_factory.mktemp("slow")
    shards = make_shards(directory / "data")
    config = write_run(
        directory / "run.yaml",
        model={"config": {**GLA, "num_hidden_layers": 1}},
        data={"path": str(shards), "packs_per_step": 3},
        train={"num_steps": INTERVALS + 2},
        metrics={"log_every": 1, "straggler_probe": True, "straggler_factor": 5.0},
        callbacks=[{"tests.train.toy:Slow": {"rank": 1, "seconds": 0.5}}],
    )
    return directory / "run", run_training(3, "--config", str(config))


def test_ranks_name_the_slow_one_and_the_others_wait(slow_run: tuple[Path, CompletedProcess[str]]):
    run_dir, done = slow_run
    assert done.returncode == 0, done.stderr
    records = read_metrics(run_dir)
    for record in records[1:]:
        callbacks, wait = record["ranks"]["callbacks"], record["ranks"]["wait"]
        assert (callbacks["rank"], callbacks["host"]) == (1, socket.gethostname())
        assert callbacks["max"] >= 0.5 > callbacks["median"]
        assert wait["rank"] == 1
        assert record["ranks"]["probe"]["min"] > 0
        assert wait["max"] > 0.25
    named = [row for record in records for row in record.get("stragglers", [])]
    assert {(row["rank"], row["phase"]) for row in named} == {(1, "callbacks")}
    assert [("stragglers" in record) for record in records] == [False] * (INTERVALS - 1) + [True] * 3
    assert done.stderr.count("stragglers: rank 1 on") == 1
    logs = {path.name: path.read_text() for path in (run_dir / "logs").iterdir()}
    assert set(logs) == {"rank0.log", "rank1.log", "rank2.log"}
    assert all(f"rank {rank} of 3 starts" in logs[f"rank{rank}.log"] for rank in range(3))
    assert f"step {INTERVALS + 2}/{INTERVALS + 2}" in logs["rank0.log"]
    view = view_run(run_dir)
    assert view.last_log[-1]["text"].startswith("stragglers: rank 1")
    assert (view.state, view.phases["callbacks"]["rank"], view.stragglers[0]["rank"]) == ("complete", 1, 1)
