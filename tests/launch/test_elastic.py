"""An elastic torchrun on two hosts: one is lost and comes back, and nothing is lost or repeated but time."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from statex_dist.checkpoint.layout import complete_tags
from statex_dist.train.metrics import read_metrics
from statex_dist.train.status import read_status
from tests.launch.elastic_callback import packs_of_step
from tests.launch.hosts import INTERFACE, Host, missing, two_hosts
from tests.launch.ports import free_port
from tests.runs import GLA, REPOSITORY, environment, losses, make_shards, run_training, write_run

NUM_STEPS, GATE_STEP = 30, 20
PACKS = 3
START_SECONDS = 240.0
"""Long enough for a start on a machine that is busy with other things."""


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("fault", ["killed", "cut off"])
def test_a_lost_host_and_its_return_cost_no_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """Three packs a step: two ranks have one and two of them, and the one that is left has three.

    The host that is cut off has rank 0, which holds the run's directory until its collectives fail.
    """
    if reason := missing(ssh=False):
        pytest.skip(reason)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY), prepend=os.pathsep)
    shards = make_shards(tmp_path / "data", num_documents=400)
    gate = tmp_path / "gate"
    broken, unbroken = (write_config(tmp_path / f"{name}.yaml", shards, gate) for name in ("broken", "unbroken"))
    run_dir, port = tmp_path / "broken", free_port()
    logs = [tmp_path / f"host{number}.log" for number in range(3)]
    with two_hosts(tmp_path, ssh=False) as hosts:
        first, second = hosts if fault == "killed" else reversed(hosts)  # torchrun numbers hosts by their addresses
        endpoint = f"{first.address}:{port}"
        with agent(first, endpoint, broken, logs[0]) as staying:
            with agent(second, endpoint, broken, logs[1]) as leaving:
                wait_for(lambda: steps(run_dir) >= 5, staying, logs)
                assert world_size(run_dir) == 2
                if fault == "killed":
                    leaving.kill()  # the host's first process: agent and rank end with it
                else:
                    second.set_link("down")
                wait_for(lambda: world_size(run_dir) == 1 and steps(run_dir) >= GATE_STEP - 1, staying, logs)
            second.set_link("up")
            with agent(second, endpoint, broken, logs[2]) as returning:
                wait_for(lambda: "Detected 1 new nodes" in text(logs[0]), staying, logs)
                gate.touch()
                codes = [job.wait(timeout=START_SECONDS) for job in (staying, returning)]
    said = "\n".join(map(text, logs))
    assert codes == [0, 0], said
    status = read_status(run_dir)
    assert status is not None
    assert (status.state, status.step, status.world_size) == ("complete", NUM_STEPS, 2), said
    resumed = [int(step) for step in re.findall(r"resuming from \S+/global_step(\d+)", text(logs[0]) + text(logs[2]))]
    assert len(resumed) == 2, said
    assert resumed[0] >= 4
    assert GATE_STEP <= resumed[1] < NUM_STEPS, "told to end for the sake of the host, the rank saves after its step"

    assert run_training(2, "--config", str(unbroken)).returncode == 0
    ours, reference = read_metrics(run_dir), read_metrics(tmp_path / "unbroken")
    assert [record["step"] for record in ours] == list(range(1, NUM_STEPS + 1))
    for name in ("targets", "tokens", "epochs"):
        assert [record[name] for record in ours] == [record[name] for record in reference]
    assert losses(run_dir) == pytest.approx(losses(tmp_path / "unbroken"), rel=2e-5)
    for step in range(1, NUM_STEPS + 1):
        packs = packs_of_step(tmp_path / "broken-packs", step)
        assert len(packs) == PACKS
        assert packs == packs_of_step(tmp_path / "unbroken-packs", step)
    assert loader_state(run_dir) == loader_state(tmp_path / "unbroken")


def write_config(path: Path, shards: Path, gate: Path) -> Path:
    options = {"directory": f"{path.with_suffix('')}-packs", "gate": str(gate), "step": GATE_STEP, "seconds": 0.05}
    return write_run(
        path,
        model={"config": GLA},
        data={"path": str(shards), "packs_per_step": PACKS},
        train={"num_steps": NUM_STEPS, "save_every": 2},
        engine={"timeout_minutes": 0.3},
        callbacks=[{"tests.launch.elastic_callback:PacksOfSteps": options}],
    )


@contextmanager
def agent(host: Host, endpoint: str, config: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Start what docs/cluster/elastic.md has on each host; nothing of it is left afterwards."""
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-id", "job", "--rdzv-endpoint", endpoint]
    # Times for a test: how long to wait for further hosts, and until a host is given up.
    rendezvous += ["--rdzv-conf", "last_call_timeout=3,keep_alive_interval=1"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc_per_node", "1"]
    train = [str(REPOSITORY / "launch/train.py"), "--config", str(config)]
    job = host.boot(*launcher, "--max-restarts", "3", *rendezvous, "--local-addr", host.address, *train)
    variables = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "GLOO_SOCKET_IFNAME": INTERFACE, "LOGLEVEL": "INFO"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            job, env={**environment(), **variables}, cwd=REPOSITORY, stdout=output, stderr=output
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for(condition: Callable[[], bool], job: subprocess.Popen[bytes], logs: list[Path]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not condition():
        said = "\n".join(map(text, logs))
        assert job.poll() is None, said
        assert time.monotonic() < deadline, said
        time.sleep(0.05)


def steps(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def world_size(run_dir: Path) -> int:
    status = read_status(run_dir)
    return 0 if status is None or status.state != "running" else status.world_size


def text(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""


def loader_state(run_dir: Path) -> dict[str, Any]:
    """Return the place in the data of the newest checkpoint."""
    newest = run_dir / "checkpoints" / complete_tags(run_dir / "checkpoints")[0]
    return torch.load(newest / "zero_pp_rank_0_mp_rank_00_model_states.pt", weights_only=False)["loader"]
