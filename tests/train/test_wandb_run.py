"""Real wandb against servers that do not exist, never answer, or stop answering: the run continues, and soon."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from statex_dist.train.wandb_run import WandbRun, flat

SCRIPT = """
import logging, sys, time
from pathlib import Path
from statex_dist.train import wandb_run
from statex_dist.train.metrics import MetricsConfig
from tests.train.observed import Observed
logging.basicConfig(level=logging.INFO)
wandb_run.PROBE_SECONDS, wandb_run.INIT_SECONDS, wandb_run.FINISH_SECONDS = 1.0, 1.0, 1.0
metrics = Observed(Path(sys.argv[1]), MetricsConfig(wandb_project="p").build(flops_per_token=0))
print("started", flush=True)
input()
for step in (1, 2):
    metrics.write({"step": step, "loss": 1.0, "lr": 0.1, "grad_norm": 1.0, "tokens": 8, "seconds": 1.0,
                   "tokens_per_s": 8.0, "time": {"data": 0.1}})
start = time.perf_counter()
metrics.close()
print(f"closed in {time.perf_counter() - start:.1f} s", flush=True)
"""


@contextmanager
def nobody() -> Iterator[int]:
    """Yield a port at which no server listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        yield probe.getsockname()[1]


@contextmanager
def silence() -> Iterator[int]:
    """Yield the port of a server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield server.getsockname()[1]


class _Hosting(BaseHTTPRequestHandler):
    """The part of a wandb server that a run needs to begin; it stops answering when its server is silent."""

    ANSWERS: ClassVar[dict[str, Any]] = {
        "upsertBucket": {
            "upsertBucket": {
                "bucket": {
                    "id": "b",
                    "name": "run",
                    "displayName": "run",
                    "project": {"id": "p", "name": "p", "entity": {"id": "e", "name": "e"}},
                    "historyLineCount": 0,
                },
                "inserted": True,
            }
        },
        "viewer": {"viewer": {"id": "v", "entity": "e", "flags": "{}", "username": "e"}},
    }

    def do_POST(self) -> None:
        query = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode(errors="replace")
        if self.server.silent.is_set():  # type: ignore[attr-defined]
            self.server.over.wait()  # type: ignore[attr-defined]
        data = next((answer for word, answer in self.ANSWERS.items() if word in query), {})
        body = json.dumps({"data": data}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = do_POST  # noqa: N815 - names of the base class

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet."""


@contextmanager
def hosting() -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Hosting) as server:
        server.daemon_threads, server.silent, server.over = True, threading.Event(), threading.Event()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.over.set()
        server.shutdown()


def start(run_dir: Path, port: int) -> subprocess.Popen[str]:
    variables = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    server = {
        "WANDB_BASE_URL": f"http://127.0.0.1:{port}",
        "WANDB_API_KEY": "0123456789" * 4,
        "WANDB_HTTP_TIMEOUT": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(run_dir)],
        env={**variables, **server},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("server", [nobody, silence])
def test_a_server_that_cannot_be_reached_is_given_up_at_the_start(tmp_path: Path, server):
    with server() as port:
        began = time.monotonic()
        said, log = start(tmp_path, port).communicate("\n", timeout=60)
    assert time.monotonic() - began < 30
    assert "started\n" in said, log
    assert "used online (" in log
    assert "wandb sync" in log
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb")), "what is not sent must lie on disk"
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").open()] == [1, 2]


def test_a_server_that_falls_silent_does_not_keep_the_run(tmp_path: Path):
    with hosting() as server:
        process = start(tmp_path, server.server_port)
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "started\n"
        server.silent.set()
        said, log = process.communicate("\n", timeout=60)
    assert process.returncode == 0, log
    assert "cannot be used" not in log
    assert "Syncing run" in log
    assert float(said.split()[2]) < 10
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").open()] == [1, 2]


def test_errors_while_logging_are_told_once(caplog):
    class Broken:
        calls = 0

        def log(self, record, step):
            self.calls += 1
            raise ConnectionError("gone\nand more")

    run = object.__new__(WandbRun)
    run._run, run._failed, run._held = Broken(), False, 0
    for step in (1, 2):
        run.log({"step": step})
    assert run._run.calls == 2
    assert caplog.messages == [
        "wandb: ConnectionError: gone; further errors of it are not reported, metrics.jsonl has it all"
    ]


def test_nested_figures_get_names_with_slashes():
    record = {"step": 3, "loss": None, "time": {"data": 0.5, "save": 0.0}, "grad_norms": {"new.decay": 2.0}}
    assert flat(record) == {"step": 3, "time/data": 0.5, "time/save": 0.0, "grad_norms/new.decay": 2.0}
