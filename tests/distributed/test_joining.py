"""Ranks that do not find each other: what each of them says."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from statex_dist.distributed import joining
from statex_dist.distributed.env import ProcessEnv, read_env, require_device, require_launcher
from statex_dist.distributed.joining import LostRanksError, check_interface
from statex_dist.errors import ConfigError, StateXError
from tests.launch.ports import free_port
from tests.raising import raises
from tests.runs import GLA, REPOSITORY, environment, make_shards, write_run

SECOND = timedelta(seconds=1)


def rank(number: int, of: int = 2) -> ProcessEnv:
    return ProcessEnv(rank=number, local_rank=number, world_size=of, device=torch.device("cpu"))


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    """A free port, given to every rank."""
    found = free_port()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(found))
    return found


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE 'two'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE '0' is not"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE '-1' is not"),
        ({"WORLD_SIZE": "2.0", "RANK": "0"}, "WORLD_SIZE '2.0' is not"),
        ({"WORLD_SIZE": "²"}, "WORLD_SIZE '²' is not"),
        ({"WORLD_SIZE": "9" * 5000, "RANK": "0"}, "WORLD_SIZE '999"),
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK 2 .*WORLD_SIZE 2"),
        ({"RANK": "1"}, "RANK 1 .*WORLD_SIZE 1"),
        ({"WORLD_SIZE": "2", "RANK": "x"}, "RANK 'x' is not"),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "one"}, "LOCAL_RANK 'one' is not"),
    ],
)
def test_wrong_variables(monkeypatch, variables: Mapping[str, str], message: str):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        read_env()


def test_a_local_rank_beyond_the_devices(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    require_device(ProcessEnv(rank=0, local_rank=0, world_size=2, device=torch.device("cuda", 0)))
    with raises(ConfigError, "LOCAL_RANK", "1", "GPU"):
        require_device(ProcessEnv(rank=1, local_rank=1, world_size=2, device=torch.device("cuda", 1)))


def test_ranks_without_a_number_on_their_host(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with raises(ConfigError, "LOCAL_RANK", "2", "GPUs"):
        require_device(ProcessEnv(rank=1, local_rank=0, world_size=2, device=torch.device("cuda", 0)))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)  # a GPU for each, by CUDA_VISIBLE_DEVICES
    require_device(ProcessEnv(rank=1, local_rank=0, world_size=2, device=torch.device("cuda", 0)))


@pytest.mark.parametrize("size", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_processes_of_another_launcher(monkeypatch, size: str):
    for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(size, "1")
    require_launcher()
    monkeypatch.setenv(size, "4")
    with pytest.raises(ConfigError, match=rf"started 4 processes \({size}\)"):
        require_launcher()
    monkeypatch.setenv("RANK", "0")  # a torchrun in each of them
    require_launcher()


@pytest.mark.parametrize("value", ["0", "65536", "-1", "http", "29500 ", "1" * 30])
def test_a_port_that_is_none(monkeypatch, port, value: str):
    monkeypatch.setenv("MASTER_PORT", value)
    with pytest.raises(ConfigError, match="is not a port"):
        joining._meet(rank(0), SECOND, {})


def test_a_master_that_is_not_given(monkeypatch, port):
    monkeypatch.delenv("MASTER_ADDR")
    with pytest.raises(ConfigError, match="missing: MASTER_ADDR"):
        joining._meet(rank(0), SECOND, {})


def test_a_port_in_use_is_named_with_the_way_to_choose_another(port):
    with (
        socket.create_server(("", port)),
        raises(ConfigError, "MASTER_PORT", port, "--master-port"),
    ):
        joining._meet(rank(0), SECOND, {})


def test_nobody_at_the_address(port):
    with raises(LostRanksError, "0", port):
        joining._meet(rank(1), SECOND, {})


def test_an_address_without_a_name(monkeypatch, port):
    monkeypatch.setattr(joining, "_NAME_SECONDS", 0.5)
    monkeypatch.setenv("MASTER_ADDR", "no-such-host.invalid")
    with raises(LostRanksError, "no-such-host.invalid"):
        joining._meet(rank(1), timedelta(minutes=10), {})


def test_rank_0_with_the_address_of_another_host(monkeypatch, port):
    monkeypatch.setattr(joining, "_ANSWER_SECONDS", 0.5)
    monkeypatch.setenv("MASTER_ADDR", "no-such-host.invalid")
    with raises(LostRanksError, "MASTER_ADDR", "no-such-host.invalid"):
        joining._meet(rank(0), timedelta(minutes=10), {})


@pytest.mark.parametrize("address", ["::1", "[::1]"])
def test_ipv6_addresses(monkeypatch, port, address: str):
    if not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    monkeypatch.setenv("MASTER_ADDR", address)
    assert not [store for store in meet_all((rank(0), {}), (rank(1), {})) if isinstance(store, Exception)]


def test_another_program_at_the_port(monkeypatch, port):
    monkeypatch.setattr(joining, "_ANSWER_SECONDS", 1.0)
    with socket.create_server(("", port)), pytest.raises(LostRanksError, match="is not rank 0"):
        joining._meet(rank(1), timedelta(minutes=10), {})


def test_ranks_that_do_not_come_are_named(port):
    with raises(LostRanksError, "12", "1", "2", "3", "4", "5", "6", "7", "8"):
        joining._meet(rank(0, of=12), SECOND, {})


def meet_all(*ranks: tuple[ProcessEnv, Mapping[str, object]]) -> list[object]:
    """Let ranks meet, each in a thread; return their stores or errors."""

    def meet(given: tuple[ProcessEnv, Mapping[str, object]]) -> object:
        try:
            return joining._meet(given[0], timedelta(seconds=5), given[1])
        except StateXError as error:
            return error

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(meet, ranks))


def test_ranks_that_are_alike_meet(port):
    stores = meet_all(*((rank(n, of=3), {"seed": 1, "stages": (1, 2)}) for n in range(3)))
    assert not [store for store in stores if isinstance(store, Exception)]
    stores[2].set("word", "there")
    assert stores[0].get("word") == b"there"


@pytest.mark.parametrize(
    ("theirs", "mine", "message"),
    [
        (
            {"optimizer.lr": 0.1},
            {"optimizer.lr": 0.2},
            "optimizer.lr 0.2.*rank 0.*has 0.1",
        ),
        ({"torch": "2.13"}, {"torch": "2.12"}, "has torch '2.12'"),
        ({"run_dir": "a", "seed": 0}, {"run_dir": "b", "seed": 1}, "run_dir 'b', .*1 other"),
    ],
)
def test_ranks_that_differ(port, theirs, mine, message):
    zero, one = meet_all((rank(0), theirs), (rank(1), mine))
    assert isinstance(zero, LostRanksError)
    assert isinstance(one, ConfigError)
    with pytest.raises(ConfigError, match=message):
        raise one


def test_another_world_size_is_another_job(port):
    zero, one = meet_all((rank(0, of=2), {}), (rank(1, of=3), {}))
    assert isinstance(zero, LostRanksError)
    assert "has WORLD_SIZE 3, rank 0" in str(one)


def test_a_rank_that_is_there_twice(port):
    results = meet_all((rank(0, of=3), {}), (rank(1, of=3), {}), (rank(1, of=3), {}))
    assert [type(result) for result in results].count(ConfigError) == 1
    assert "two processes have this RANK" in str(next(r for r in results if isinstance(r, ConfigError)))


def test_an_interface_that_is_not_here(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    check_interface()
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo,ib77")
    with raises(ConfigError, "ib77"):
        check_interface()


def test_agents_of_several_hosts_that_restart_ranks_need_a_store_for_each_start(port, monkeypatch):
    given = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_MAX_RESTARTS": "3", "GROUP_WORLD_SIZE": "2"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with raises(ConfigError, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1", "--max-restarts"):
        joining.join_processes(rank(0), "gloo", join_limit=SECOND, wait_limit=SECOND)


@pytest.mark.distributed
def test_the_training_script_says_one_line(tmp_path: Path):
    """Rank 0 of two at a port in use, and at a free one where rank 1 never comes; ``status.json`` says it too."""
    shards = make_shards(tmp_path / "data", num_documents=5)
    file = write_run(tmp_path / "run.yaml", model={"config": GLA}, data={"path": str(shards)})
    (tmp_path / "run").mkdir()
    command = [sys.executable, str(REPOSITORY / "launch" / "train.py"), "--config", str(file)]
    with socket.create_server(("", 0)) as server:
        taken = server.getsockname()[1]
        variables = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken)}
        done = subprocess.run(
            command, env={**environment(), **variables}, capture_output=True, text=True, timeout=120, check=False
        )
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if " INFO " not in line]
    assert len(errors) == 1, done.stderr
    assert errors[0].startswith(f"error: MASTER_PORT {taken} is in use")
    assert f"MASTER_PORT {taken} is in use" in (tmp_path / "run" / "status.json").read_text()


def test_a_signal_ends_a_rank_that_waits(port):
    """Also one that was to be answered by a save: there is nothing to save yet, and launchers wait for the end."""
    script = (
        "import signal, torch; from datetime import timedelta; from statex_dist.distributed import joining, env;"
        "signal.signal(signal.SIGTERM, lambda *a: None);"
        "print('here', flush=True);"
        "joining.join_processes(env.read_env(), 'gloo', join_limit=timedelta(60), wait_limit=timedelta(60))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script],
        env={**environment(), "RANK": "1", "WORLD_SIZE": "2"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as waiting:
        assert waiting.stdout is not None
        assert waiting.stdout.readline() == "here\n"
        time.sleep(0.5)
        for _ in range(100):  # the first may come before the wait begins
            waiting.terminate()
            time.sleep(0.1)
            if waiting.poll() is not None:
                break
        assert waiting.poll() == -signal.SIGTERM
