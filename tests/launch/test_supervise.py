"""The supervisor restarts real jobs after killed ranks, a killed launcher, pre-emption or a change of world size."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.scale_nodes import lost_node_rows
from launch.supervisor import processes
from launch.supervisor.attempt import TRAIN, Attempt
from launch.supervisor.hosts import Host, answering, fill, read_hostfile
from launch.supervisor.loop import Policy, Supervisor, Verdict
from statex_dist.checkpoint.layout import complete_tags, tag_of
from statex_dist.checkpoint.manifest import Manifest
from statex_dist.config import parse_config
from statex_dist.durable.lock import acquire
from statex_dist.errors import ConfigError
from statex_dist.run_config import RunConfig
from statex_dist.train.status import ATTEMPT_VARIABLE, RunStatus, read_status
from tests.runs import GLA, REPOSITORY, environment, expanded, losses, make_shards, run_training, save_model, write_run

NUM_STEPS = 10


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def sections(root: Path) -> dict[str, dict]:
    return {
        "model": {"path": str(save_model(expanded(GLA), root / "model"))},
        "data": {"path": str(make_shards(root / "data")), "packs_per_step": 6},
        "train": {"num_steps": NUM_STEPS, "save_every": 2},
    }


@pytest.fixture(scope="module")
def reference(root: Path, sections: dict[str, dict]) -> list[float]:
    """Return the losses of an undisturbed run on 2 ranks."""
    result = run_training(2, "--config", str(write_run(root / "reference.yaml", **sections)))
    assert result.returncode == 0, result.stderr
    return losses(root / "reference")


class Supervised:
    """A supervisor in a process of its own, and the processes that it has started."""

    def __init__(self, file: Path, *options: str) -> None:
        self.file, self.run_dir = file, file.parent / file.stem
        self.log = file.with_suffix(".log")
        command = [sys.executable, str(REPOSITORY / "launch" / "supervise.py"), "--backoff", "0.1", *options]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen([*command, "--", "--config", str(file)], env=environment(), stderr=log)

    def launcher(self) -> psutil.Process:
        return psutil.Process(self.process.pid).children()[0]

    def ranks(self) -> list[psutil.Process]:
        return sorted(self.launcher().children(), key=lambda rank: rank.environ()["RANK"])

    def wait_for_steps(self, attempt: int, steps: int) -> None:
        """Wait until an attempt has begun and ``steps`` are done."""
        deadline = time.monotonic() + 240
        metrics = self.run_dir / "metrics.jsonl"
        while not (
            f"attempt {attempt}:" in self.log.read_text()
            and metrics.exists()
            and metrics.read_text().count("\n") >= steps
        ):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.005)

    def end(self, timeout: float = 240) -> int:
        code = self.process.wait(timeout)
        left = [
            process for process in psutil.process_iter(["cmdline"]) if str(self.file) in (process.info["cmdline"] or ())
        ]
        assert left == []
        return code


@pytest.mark.slow
@pytest.mark.distributed
def test_a_killed_rank_and_a_killed_launcher_are_made_good(
    root: Path, sections: dict[str, dict], reference: list[float]
):
    job = Supervised(write_run(root / "killed.yaml", **sections), "--nproc", "2")
    job.wait_for_steps(1, 3)
    job.ranks()[1].kill()
    job.wait_for_steps(2, 6)
    job.launcher().kill()
    assert job.end() == 0, job.log.read_text()
    said = job.log.read_text()
    assert re.findall(r"attempt (\d): 2 ranks, from step \d", said) == ["1", "2", "3"]
    assert "attempt 1: 2 ranks, from step 0" in said
    assert re.search(r"attempt 2: ended after \d+ s, newest checkpoint of step [46]: launcher ended by SIGKILL", said)
    assert re.search(r"attempt 3: ended after \d+ s, newest checkpoint of step 10: complete", said)
    assert losses(job.run_dir) == reference, "not the same bits as without the kills"
    status = read_status(job.run_dir)
    assert status is not None
    assert (status.state, status.step, status.world_size) == ("complete", NUM_STEPS, 2)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_preempted_run_goes_on_with_another_number_of_ranks(
    root: Path, sections: dict[str, dict], reference: list[float]
):
    file = write_run(root / "preempted.yaml", **sections)
    job = Supervised(file, "--nproc", "2")
    job.wait_for_steps(1, 3)
    job.process.terminate()
    assert job.end() == 75, job.log.read_text()
    status = read_status(job.run_dir)
    assert status is not None
    assert status.state == "preempted"
    assert status.step is not None
    assert 3 <= status.step < NUM_STEPS
    assert f"saved at step {status.step}" in job.log.read_text()

    again = Supervised(file, "--nproc", "4")
    assert again.end() == 0, again.log.read_text()
    assert f"attempt 1: 4 ranks, from step {status.step}" in again.log.read_text()
    assert losses(again.run_dir) == pytest.approx(reference, rel=2e-5)
    assert complete_tags(again.run_dir / "checkpoints")[0] == tag_of(NUM_STEPS)
    assert Manifest.read(again.run_dir / "checkpoints" / tag_of(NUM_STEPS)).info["world_size"] == 4


@pytest.mark.distributed
def test_what_a_restart_would_not_mend_is_not_restarted(root: Path, sections: dict[str, dict]):
    file = write_run(root / "wrong.yaml", **{**sections, "data": {"path": str(root / "nowhere"), "packs_per_step": 6}})
    job = Supervised(file, "--nproc", "2")
    assert job.end() == 2, job.log.read_text()
    said = job.log.read_text()
    assert "nowhere" in said
    assert "not help" in said
    assert "attempt 2" not in said


def supervise(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / "launch" / "supervise.py"), *arguments]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    ("options", "train", "words"),
    [
        (["--nproc", "2"], None, "give the arguments of launch/train.py after --"),
        (["--nproc", "two"], [], "argument --nproc: invalid int value: 'two'"),
        (["--nproc", "2", "--hostfile", "x"], [], "not allowed with argument"),
        (["--nproc", "0"], [], "--nproc must be 1 or more, not 0"),
        (["--min-ranks", "0"], [], "--min-ranks must be 1 or more, not 0"),
        (["--spares", "1"], [], "--spares holds back hosts of a --hostfile"),
        (["--backoff", "-1"], [], "--backoff must be 0 or more, not -1"),
        (["--hostfile", "/nowhere"], [], "--hostfile /nowhere cannot be read"),
        (["--nproc", "2"], ["--train.steps", "3"], "train.steps"),
        (
            ["--nproc", "2", "--min-ranks", "2"],
            ["--data.packs_per_step", "1"],
            "2 ranks are available, of which data.packs_per_step=1 and parallel.context=1 can use 1, fewer than",
        ),
    ],
)
def test_wrong_usage_is_refused_in_a_line_before_anything_starts(
    tmp_path: Path, capsys, options: list[str], train: list[str] | None, words: str
):
    from launch.supervise import main

    file = write_run(tmp_path / "run.yaml", model={"config": GLA}, data={"path": "shards"})
    arguments = options if train is None else [*options, "--", "--config", str(file), *train]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_it_starts_by_its_path_and_helps():
    done = supervise("--help")
    assert done.returncode == 0
    assert "--max-restarts N" in done.stdout


def make(tmp_path: Path, *arguments: str, ranks: int = 4, hosts: list[Host] | None = None, **policy) -> Supervisor:
    file = write_run(
        tmp_path / "run.yaml", model={"config": GLA}, data={"path": str(tmp_path / "shards"), "packs_per_step": 6}
    )
    given = ["--config", str(file), *arguments]
    config = parse_config(RunConfig, given, prog="train.py")
    return Supervisor(config, given, ranks=ranks, hosts=hosts or (), policy=Policy(**{"backoff": 0.0, **policy}))


def test_each_rank_gets_a_pack(tmp_path: Path):
    job = make(tmp_path, ranks=8)
    assert [ranks(job, n) for n in range(9)] == [0, 1, 2, 3, 4, 5, 6, 6, 6]
    assert ranks(make(tmp_path, "--engine.name", "plain"), 8) == 1
    assert [ranks(make(tmp_path, "--parallel.context", "2", ranks=8), n) for n in (7, 14)] == [6, 12]
    assert ranks(make(tmp_path, "--parallel.context", "4", ranks=8), 7) == 4


def ranks(job: Supervisor, *slots: int) -> int:
    return sum(host.slots for host in job.use([Host(f"host{i}", n) for i, n in enumerate(slots)]))


def test_a_second_supervisor_is_refused(tmp_path: Path):
    job = make(tmp_path)
    job.run_dir.mkdir()
    with acquire(job.run_dir / ".supervise.lock"), pytest.raises(ConfigError, match="another supervisor watches it"):
        job.run()


def replay(job: Supervisor, monkeypatch, script: list[tuple[int, Verdict]]) -> tuple[int, list[float]]:
    """Run the loop over attempts that end as the script says, each leaving a newest step; return code and pauses."""
    pauses: list[float] = []
    monkeypatch.setattr("launch.supervisor.loop.random.uniform", lambda low, high: 1.0)
    monkeypatch.setattr(job, "_pause", lambda failures: pauses.append(failures))
    steps = iter(script)
    newest = -1

    def attempt(number: int) -> Verdict:
        nonlocal newest
        newest, verdict = next(steps)
        return verdict

    monkeypatch.setattr(job, "_attempt", attempt)
    monkeypatch.setattr(job, "newest_step", lambda: newest)
    return job.run(), pauses


def test_only_restarts_without_progress_count(tmp_path: Path, monkeypatch):
    fails, ends = Verdict("failed"), Verdict("complete", 0)
    job = make(tmp_path, max_restarts=2)
    script = [(-1, fails), (-1, fails), (2, fails), (2, fails), (2, fails), (4, fails), (6, ends)]
    assert replay(job, monkeypatch, script) == (0, [1, 2, 0, 1, 2, 0])
    assert replay(make(tmp_path, max_restarts=2), monkeypatch, [(4, fails)] * 4) == (1, [0, 1, 2])
    assert replay(make(tmp_path, max_restarts=0), monkeypatch, [(-1, fails)] * 2) == (1, [])
    assert replay(make(tmp_path), monkeypatch, [(4, Verdict("stopped", 75))]) == (75, [])


def test_the_pause_doubles_and_ends_when_told_to_stop(tmp_path: Path, monkeypatch, caplog):
    caplog.set_level("INFO")
    job = make(tmp_path, backoff=100.0)
    job.stop.received = True
    monkeypatch.setattr("launch.supervisor.loop.random.uniform", lambda low, high: 1.0)
    for failures in (0, 1, 2, 9):
        job._pause(failures)
    assert re.findall(r"again in (\d+) s", caplog.text) == ["100", "100", "200", "600"]


@pytest.mark.parametrize(
    ("status", "code", "stopped", "expected"),
    [
        ({"state": "complete", "step": 10}, 0, False, Verdict("complete", 0)),
        ({"state": "complete", "step": 10}, 1, False, Verdict("complete", 0)),
        ({"state": "preempted", "step": 7}, 1, False, Verdict("told to stop, and saved at step 7", 75)),
        ({"state": "running", "step": 4}, -9, False, Verdict("launcher ended by SIGKILL")),
        ({"state": "running", "step": 4}, 1, True, Verdict("told to stop, and not saved (launcher exit code 1)", 75)),
        (None, None, True, Verdict("told to stop, and not saved (the ranks did not end within 300 s)", 75)),
        (None, 1, False, Verdict("launcher exit code 1")),
        (
            {"state": "failed", "step": 9, "exit_code": 2, "message": "disk full"},
            1,
            False,
            Verdict("disk full (exit code 2; launcher exit code 1)"),
        ),
        (
            {"state": "failed", "step": 4, "exit_code": 2, "message": "no data"},
            1,
            False,
            Verdict("no data (exit code 2; launcher exit code 1)"),
        ),
        (
            # Every such start would save a newer checkpoint, and so never use up its restarts.
            {"state": "failed", "step": 9, "exit_code": 1, "message": "the loss is nan", "restart": False},
            1,
            False,
            Verdict("the loss is nan (exit code 1; launcher exit code 1); to start it again would not help", 1),
        ),
        (None, -40, False, Verdict("launcher ended by signal 40")),
    ],
)
def test_how_an_attempt_ended_decides_what_follows(tmp_path: Path, status, code, stopped: bool, expected: Verdict):
    job = make(tmp_path)
    job.stop.received = stopped
    said = None if status is None else RunStatus(world_size=2, **status)
    assert job._judge(said, code, 4) == expected


def test_what_was_wrong_from_the_beginning_is_not_started_again(tmp_path: Path):
    said = RunStatus(state="failed", step=None, world_size=2, exit_code=2, message="no model")
    expected = Verdict("no model (exit code 2; launcher exit code 1); to start it again would not help", 2)
    assert make(tmp_path)._judge(said, 1, -1) == expected


def test_only_what_this_attempt_said_counts(tmp_path: Path, monkeypatch, caplog):
    from statex_dist.train.status import write_status

    job = make(tmp_path)
    job.run_dir.mkdir()
    assert job._status("a") is None
    monkeypatch.setenv(ATTEMPT_VARIABLE, "a")
    write_status(job.run_dir, RunStatus(state="complete", step=1, world_size=1))
    assert job._status("b") is None
    found = job._status("a")
    assert found is not None
    assert found.state == "complete"
    (job.run_dir / "status.json").write_text("{")
    assert job._status("a") is None
    assert "cannot be read" in caplog.text


RANK = "import signal, sys, time; signal.signal(signal.SIGTERM, {handler}); print('up', flush=True); time.sleep(60)"


def start(name: str, handler: str, **variables: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-c", RANK.format(handler=handler)],
        env={**os.environ, ATTEMPT_VARIABLE: name, **variables},
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    process.stdout.close()
    return process


def test_processes_are_found_by_the_name_of_their_attempt(tmp_path: Path):
    name = f"test-{os.getpid()}"
    rank = start(f"{name}-1", "lambda *_: sys.exit(75)", RANK="0")
    launcher = start(f"{name}-1", "signal.SIG_IGN")
    other = start(f"{name}2-1", "signal.SIG_DFL", RANK="0")
    try:
        assert {process.pid for process, _ in processes.find(f"{name}-")} == {rank.pid, launcher.pid}
        assert processes.ask_ranks_to_stop(f"{name}-", {rank.pid}) == set(), "it was told already"
        assert processes.ask_ranks_to_stop(f"{name}-") == {rank.pid}
        assert rank.wait(timeout=20) == 75
        assert launcher.poll() is None, "a launcher that is told to stop would kill its ranks before they have saved"
        assert processes.kill(f"{name}-1") == 1
        assert launcher.wait(timeout=20) == -signal.SIGKILL
        assert other.poll() is None
        assert processes.main(["KILL", f"{name}2-1"]) == 0
        assert other.wait(timeout=20) == -signal.SIGKILL
        assert processes.kill(name) == 0
    finally:
        for process in (rank, launcher, other):
            process.kill()
            process.wait()


def test_what_a_killed_supervisor_left_is_ended_first(tmp_path: Path, caplog):
    job = make(tmp_path, grace=20)
    polite = start(f"{job.run_name}-old", "lambda *_: sys.exit(75)", RANK="0")
    orphan = start(f"{job.run_name}-old", "signal.SIG_IGN")
    job.policy = Policy(grace=1.0)
    try:
        job._end_leftovers()
        assert polite.wait(timeout=20) == 75
        assert orphan.wait(timeout=20) == -signal.SIGKILL
        assert "earlier supervisor" in caplog.text
    finally:
        for process in (polite, orphan):
            process.kill()
            process.wait()


def test_a_hostfile_is_read(tmp_path: Path):
    file = tmp_path / "hosts"
    file.write_text("# ours\nnode-a slots=4\n\nnode-b   slots=2 # slow\n")
    assert read_hostfile(file) == [Host("node-a", 4), Host("node-b", 2)]
    for text in ("\ufeffnode-a slots=4\r\n\r\n", "node-a\tslots=4", "  node-a  slots=4  #\n#x\n", "node-a slots=04\n"):
        file.write_text(text, encoding="utf-8", newline="")
        assert read_hostfile(file) == [Host("node-a", 4)]
    file.write_text("user@10.0.0.1 slots=1\nnode_2.rack.example slots=1024\n")
    assert read_hostfile(file) == [Host("user@10.0.0.1", 1), Host("node_2.rack.example", 1024)]
    for text, words in (
        ("", "names no host"),
        ("# nobody\n", "names no host"),
        ("node-a\n", "line 1: 'node-a'"),
        ("a slots=1\nb slots=0\n", "line 2: slots=0 of b: .* 1 to 1024"),
        ("a slots=1\nb slots=-1\n", "line 2: 'b slots=-1'"),
        ("a slots=2000\n", "line 1: slots=2000"),
        (f"a slots={'9' * 5000}\n", "line 1: slots=999"),
        ("a slots=2 max_slots=4\n", "line 1: .*the form"),
        ("a: slots=2\n", "line 1: 'a:'.*host name"),
        ("a slots=1\n\na slots=1\n", "line 3: a .*line 1"),
        ("a slots=1\nA slots=1\n", "line 2: A .*line 1"),
        ("\n[fe80::1] slots=2\n", "line 2: .*IPv6 address"),
        ("::1 slots=2\n", "line 1: .*IPv6 address"),
        ("node-[1-4] slots=2\n", "line 1: .*host name"),
        ("a,b slots=2\n", "line 1: .*host name"),
        ("-oProxyCommand=x slots=2\n", "line 1: .*host name"),
        ("a\ufeff slots=2\n", "line 1: .*host name"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=words):
            read_hostfile(file)
    file.write_bytes("a slots=2".encode("utf-16"))
    with pytest.raises(ConfigError, match="save it as UTF-8"):
        read_hostfile(file)


def test_hosts_are_filled_whole_and_the_rest_are_spares():
    hosts = [Host("a", 4), Host("b", 1), Host("c", 4)]
    assert fill(hosts, group=1, most=20) == hosts
    assert fill(hosts, group=1, most=7) == [Host("a", 4), Host("b", 1), Host("c", 2)]
    assert fill(hosts, group=1, most=4) == [Host("a", 4)]
    assert fill([], group=1, most=4) == []


@given(st.lists(st.integers(1, 16), min_size=1, max_size=20), st.integers(1, 8), st.integers(1, 100))
def test_a_context_group_lies_within_a_host_that_has_room(slots: list[int], group: int, most: int):
    hosts = [Host(f"host{number}", count) for number, count in enumerate(slots)]
    used = fill(hosts, group=group, most=most)
    if max(slots) >= group:
        assert all(host.slots % group == 0 for host in used)
        assert sum(host.slots for host in used) == min(sum(n // group for n in slots), most) * group
    else:
        assert sum(host.slots for host in used) == min(sum(slots) // group, most) * group
    assert all(host.slots <= given.slots for host in used for given in hosts if given.name == host.name)


@pytest.mark.parametrize(("context", "passes", "before"), [(1, 5, 8), (8, 33, 64)])
def test_one_lost_host_of_128_idles_none_of_the_others(context: int, passes: int, before: int):
    """Until packs could be uneven, 512 of 1016 ranks were used, and 64 of 64 context groups lay on two hosts."""
    rows = {name: value for name, _, value, _ in lost_node_rows([128], context=context)}
    assert rows["healthy GPUs used"] == 100
    assert rows["context groups on several hosts"] == 0
    assert rows["packs per rank, at most"] == passes
    assert rows["packs per rank with the divisor rule"] == before
    assert rows["healthy GPUs used with the divisor rule"] == pytest.approx(50.4, abs=0.1)


def test_a_spare_takes_the_place_of_a_lost_host(tmp_path: Path):
    hosts = [Host(name, 2) for name in "abcd"]
    job = make(tmp_path, hosts=hosts, spares=1)
    assert job.use(hosts) == hosts[:3]
    assert job.use(hosts[1:]) == hosts[1:]
    assert job.use(hosts[2:]) == hosts[2:]
    # Six packs need no more than six ranks: without the option too the fourth host is a spare.
    assert make(tmp_path, hosts=hosts).use(hosts) == hosts[:3]
    with pytest.raises(ConfigError, match="--spares 4 leaves none of the 4 hosts"):
        make(tmp_path, hosts=hosts, spares=4)


def test_hosts_get_a_hostfile_of_what_is_left_and_the_name_of_the_attempt(tmp_path: Path, monkeypatch):
    (tmp_path / "given").write_text("NCCL_DEBUG=INFO\n\n")
    monkeypatch.setenv("DS_ENV_FILE", str(tmp_path / "given"))
    attempt = Attempt("run-1", ["--config", "x.yaml"], ranks=3, hosts=[Host("a", 2), Host("c", 1)])
    command = attempt._command()
    assert command[-3:] == [str(TRAIN), "--config", "x.yaml"]
    assert "--force_multi" in command, "the one host that is left may be another machine"
    assert 20000 <= int(command[command.index("--master_port") + 1]) < 32768
    assert Path(command[command.index("--hostfile") + 1]).read_text() == "a slots=2\nc slots=1\n"
    assert attempt._environment_file().read_text() == f"NCCL_DEBUG=INFO\n{ATTEMPT_VARIABLE}=run-1\n"


def test_hosts_that_do_not_answer_are_left_out(tmp_path: Path, monkeypatch, caplog):
    ssh = tmp_path / "ssh"  # the remote end: one host is well, one refuses, one hangs
    ssh.write_text(
        '#!/bin/sh\ncase "$*" in *" well true") exit 0;; *" refuses "*) exit 255;; *) exec sleep 60;; esac\n'
    )
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr("launch.supervisor.hosts.ANSWER_SECONDS", 1)
    assert answering([Host("hangs", 1), Host("well", 2), Host("refuses", 3)]) == [Host("well", 2)]
    assert "hangs, refuses: no answer" in caplog.text
    job = make(tmp_path, hosts=[Host("refuses", 3)])
    assert job._attempt(1) == Verdict("0 ranks can be used, too few for --min-ranks 1")
