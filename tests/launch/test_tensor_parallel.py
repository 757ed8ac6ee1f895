"""Starting ranks for ``--tp``: exit codes, signals, and numbers that do not fit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist

import launch.tensor_parallel
from launch.tensor_parallel import open_tensor_parallel, start_ranks, wants_ranks
from statex_dist.distributed import joining
from statex_dist.distributed.error_sync import OtherRankError
from statex_dist.errors import ConfigError, StateXError
from tests.launch.ports import free_port
from tests.raising import raises

SCRIPT = """
import os, signal, sys, time
from pathlib import Path
assert not [path for path in sys.path if Path(path).name == "launch"], "it holds packages' modules"
rank, what = os.environ["RANK"], sys.argv[1]
Path(what).mkdir(exist_ok=True)
Path(what, rank).write_text(" ".join([os.environ["WORLD_SIZE"], *sys.argv[2:]]))
if what == "codes":
    sys.exit(2)
if what == "aborted" and rank == "1":
    os.abort()
if what == "killed" and rank == "1":
    os.kill(os.getpid(), signal.SIGKILL)
if what in ("aborted", "killed", "stopped"):
    Path(what, rank + ".pid").write_text(str(os.getpid()))
    time.sleep(60)
"""
PARENT = """
import sys
from launch.tensor_parallel import start_ranks
sys.exit(start_ranks(2, ["stopped"], module="ranks_of_a_test"))
"""


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "ranks_of_a_test.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parents[2]}")
    return tmp_path


@pytest.mark.distributed
def test_every_rank_gets_the_command_and_its_place(script):
    assert start_ranks(2, ["done", "--tp", "2"], module="ranks_of_a_test") == 0
    assert [(script / "done" / rank).read_text() for rank in "01"] == ["2 --tp 2"] * 2


@pytest.mark.distributed
def test_the_exit_code_is_that_of_the_ranks(script, capfd):
    assert start_ranks(2, ["codes"], module="ranks_of_a_test") == 2
    assert capfd.readouterr() == ("", ""), "the ranks say what is wrong, torch nothing"


@pytest.mark.distributed
def test_a_killed_rank_stops_the_others_and_is_named(script):
    with raises(StateXError, "1", "2", "SIGKILL"):
        start_ranks(2, ["killed"], module="ranks_of_a_test")


@pytest.mark.distributed
def test_memory_is_not_blamed_for_an_abort(script):
    with raises(StateXError, "1", "2", "SIGABRT"):
        start_ranks(2, ["aborted"], module="ranks_of_a_test")


@pytest.mark.distributed
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_the_ranks_end_with_the_process_that_started_them(script, sent, code):
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stderr=subprocess.PIPE, text=True)
    pids = [script / "stopped" / f"{rank}.pid" for rank in "01"]
    while not all(file.exists() and file.read_text() for file in pids):
        assert parent.poll() is None
        time.sleep(0.05)
    parent.send_signal(sent)
    # The ranks have its standard error: the end of that is theirs.
    _, said = parent.communicate(timeout=30)
    assert (parent.returncode, said) == (code, "")


@pytest.mark.distributed
def test_code_in_the_current_directory_is_not_run(script, monkeypatch, capfd):
    monkeypatch.delenv("PYTHONPATH")
    (script / "launch").mkdir()
    (script / "launch" / "__init__.py").write_text("")
    (script / "launch" / "cli.py").write_text("open('foreign', 'w')")
    assert start_ranks(2, ["generate", "--model", "none", "--seed", "x"]) == 2
    assert "seed" in capfd.readouterr().err, "our own command has read the options"
    assert not (script / "foreign").exists()


@pytest.mark.distributed
def test_a_source_tree_need_not_be_installed(script, monkeypatch):
    # -S: no site-packages, so nothing that is installed can be imported.
    monkeypatch.delenv("PYTHONPATH")
    (script / "tree" / "launch").mkdir(parents=True)
    rank = Path(launch.tensor_parallel.__file__).with_name("rank.py")
    (script / "tree" / "launch" / "rank.py").write_bytes(rank.read_bytes())
    (script / "tree" / "launch" / "own.py").write_text("import sys; print(sys.argv[1:])")
    command = [sys.executable, "-S", "-P", str(script / "tree" / "launch" / "rank.py"), str(os.getpid()), "launch.own"]
    assert subprocess.check_output([*command, "--tp", "2"], text=True) == "['--tp', '2']\n"


def test_ranks_are_started_where_there_are_none(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert [wants_ranks(tp) for tp in (None, 1, 2)] == [False, False, True]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not wants_ranks(2)
    with raises(ConfigError, "--tp", "1", "0"):
        wants_ranks(0)


def test_a_machine_with_too_few_gpus_starts_nothing(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with raises(ConfigError, "--tp", "4", "GPUs", "2", "--device"):
        start_ranks(4, [])


@pytest.mark.distributed
def test_ranks_on_the_cpu_may_be_more_than_gpus(script, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert start_ranks(2, ["done"], device="cpu", module="ranks_of_a_test") == 0
    assert (script / "done" / "1").is_file()


def test_one_rank_alone_has_no_share(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with open_tensor_parallel(1) as share:
        assert share is None
    with raises(ConfigError, "--tp", "2", "1"), open_tensor_parallel(2):
        pass


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 of 2, whose peer says of itself what it says."""
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    store = SimpleNamespace(set_timeout=lambda limit: None)
    monkeypatch.setattr(joining, "_meet", lambda *args: store)
    for name in ("init_process_group", "destroy_process_group"):
        monkeypatch.setattr(dist, name, lambda *args, **options: None)

    def gather(values, value, group=None):
        values[:] = [0, value]

    monkeypatch.setattr(dist, "all_gather_object", gather)


@pytest.mark.usefixtures("two_ranks")
def test_another_number_of_ranks_is_refused():
    with raises(ConfigError, "--tp", "4", "2"), open_tensor_parallel(4):
        pass


@pytest.mark.usefixtures("two_ranks")
def test_a_rank_on_the_cpu_needs_no_gpu(monkeypatch):
    backends = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: backends.append(backend))
    with open_tensor_parallel(2, device="cpu"):
        assert backends == ["gloo"]
    with raises(ConfigError, "1", "GPU"), open_tensor_parallel(2):
        pass


def test_ranks_that_do_not_come_are_not_waited_for_long(monkeypatch):
    for name, seconds in (("JOIN_LIMIT", 1), ("WAIT_LIMIT", 20)):
        monkeypatch.setattr(launch.tensor_parallel, name, timedelta(seconds=seconds))
    place = {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    wanted = r"2 ranks.*127.0.0.1:\d+ .*1 s: 1;"
    with pytest.raises(joining.LostRanksError, match=wanted), open_tensor_parallel(2):
        pass


@pytest.mark.usefixtures("two_ranks")
@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (RuntimeError("[pair.cc:547] Connection closed by peer [127.0.0.1]:1"), OtherRankError),
        (RuntimeError("shapes do not fit"), RuntimeError),
        (KeyboardInterrupt(), OtherRankError),
        (ConfigError("no such option"), ConfigError),
    ],
)
def test_what_another_rank_says_is_not_said_twice(error, seen):
    def fail() -> None:
        with open_tensor_parallel(None) as share:
            assert (share.rank, share.size) == (1, 2)
            raise error

    with pytest.raises(seen) as caught:
        fail()
    assert type(caught.value) is seen


def test_megatron_that_is_missing_is_said_before_ranks_start(monkeypatch):
    monkeypatch.setitem(sys.modules, "megatron", None)
    with pytest.raises(ConfigError, match=r"pip install 'statex-dist\[megatron\]'"):
        wants_ranks(2)
    assert not wants_ranks(None)
