"""A job on two hosts through ``deepspeed --hostfile``: real ssh, pdsh and network, in namespaces of this machine."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from statex_dist.train.status import read_status
from tests.launch.hosts import INTERFACE, Host, missing, two_hosts
from tests.runs import GLA, REPOSITORY, environment, losses, make_shards, run_training, write_run

NUM_STEPS = 30
TIMEOUT_SECONDS = 18.0
START_SECONDS = 300.0
"""Long enough for a whole job on a machine that is busy with other things."""


@pytest.mark.slow
@pytest.mark.distributed
def test_two_hosts_train_as_one_does_through_a_cut_network(tmp_path: Path) -> None:
    """The network of one host is cut: the job ends, the same command resumes, and the losses are those of one host."""
    if reason := missing():
        pytest.skip(reason)
    shards = make_shards(tmp_path / "data", num_documents=400)
    config, run_dir = write_config(tmp_path / "both.yaml", shards), tmp_path / "both"
    with two_hosts(tmp_path) as (first, second):
        log = tmp_path / "log"
        with hostfile_job((first, second), config, log) as job:
            wait_for_steps(5, run_dir / "metrics.jsonl", job, log)
            second.set_link("down")
            cut = time.monotonic()
            # The ranks wait for each other now. At the same time one host does the same run undisturbed.
            alone = run_training(2, "--config", str(write_config(tmp_path / "alone.yaml", shards)))
            assert alone.returncode == 0, alone.stderr
            # The timeout of collectives, that of ssh, and time for the launchers to end.
            limit = TIMEOUT_SECONDS + 60 - (time.monotonic() - cut)
            assert job.wait(timeout=max(limit, 1)) != 0, text(log)
        status = read_status(run_dir)
        assert status is not None
        assert (status.state, status.exit_code) == ("failed", 1)
        assert "Timed out" in status.message
        done = len(losses(run_dir))
        assert 5 <= done < NUM_STEPS

        second.set_link("up")
        log = tmp_path / "resumed"
        with hostfile_job((first, second), config, log) as job:
            assert job.wait(timeout=START_SECONDS) == 0, text(log)
    resumed = re.search(r"resuming from \S+/global_step(\d+)", text(log))
    assert resumed is not None, text(log)
    assert 0 < int(resumed[1]) <= done
    assert losses(run_dir) == losses(tmp_path / "alone")
    # pdsh marks each line with the host it comes from: both took part.
    assert all(f"{host.name}: " in text(log) for host in (first, second))


def write_config(path: Path, shards: Path) -> Path:
    return write_run(
        path,
        model={"config": GLA},
        data={"path": str(shards)},
        train={"num_steps": NUM_STEPS, "save_every": 2},
        engine={"timeout_minutes": TIMEOUT_SECONDS / 60},
    )


@contextmanager
def hostfile_job(hosts: tuple[Host, Host], config: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Start what a user starts on the first host (docs/cluster/hostfile.md); nothing of it is left afterwards."""
    hostfile, variables = config.with_name("hostfile"), config.with_name("deepspeed_env")
    hostfile.write_text("".join(f"{host.name} slots=1\n" for host in hosts), encoding="utf-8")
    # A host's ranks begin with an empty environment: what they need is listed here.
    needed = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": INTERFACE}
    variables.write_text("".join(f"{name}={value}\n" for name, value in needed.items()), encoding="utf-8")
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--hostfile", str(hostfile)]
    train = ["--master_addr", hosts[0].name, str(REPOSITORY / "launch/train.py"), "--config", str(config)]
    with log.open("wb") as output:
        job = subprocess.Popen(
            hosts[0].command(*launcher, *train),
            env={**environment(), "DS_ENV_FILE": str(variables)},
            cwd=REPOSITORY,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        yield job
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()


def wait_for_steps(count: int, metrics: Path, job: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not metrics.is_file() or metrics.read_bytes().count(b"\n") < count:
        assert job.poll() is None, text(log)
        assert time.monotonic() < deadline, text(log)
        time.sleep(0.02)


def text(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")
