"""Crowds of half-open connections against the real process: it answers others, ends them, and writes a bounded log."""

import json
import re
import resource
import socket
import subprocess
import sys
from contextlib import ExitStack, contextmanager

import pytest
import requests

from statex_dist.data.tokenizer import BytesTokenizer
from statex_dist.models.hf import save_pretrained
from tests.evaluation.stand_ins import tiny_model
from tests.inference.serving.running import NAME, PATIENCE_SECONDS, read_to_end
from tests.runs import REPOSITORY, environment

HALF = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
MOST_LOG_BYTES = 4096


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model") / NAME
    directory.mkdir()
    save_pretrained(tiny_model(), directory)
    BytesTokenizer().save(directory)
    return directory


@contextmanager
def served(model_dir, tmp_path, *options, files=None):
    """Run the real command with a limit of open files, and yield its address and log."""
    log = tmp_path / "log"
    limits = resource.getrlimit(resource.RLIMIT_NOFILE) if files is None else (files, files)
    with (
        log.open("wb") as stderr,
        subprocess.Popen(
            [sys.executable, "-m", "launch.cli", "serve", "--model", str(model_dir), "--port", "0", *options],
            cwd=REPOSITORY,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, limits),
        ) as process,
    ):
        try:
            yield re.search(r"http://\S+(?=:)", process.stdout.readline())[0], log
            process.terminate()
            assert process.wait(PATIENCE_SECONDS) == 0
        finally:
            process.kill()


def half_open(stack, url, count):
    """Open connections that never finish the head of their request."""
    host, port = url.removeprefix("http://").split(":")
    connections = [stack.enter_context(socket.create_connection((host, int(port)))) for _ in range(count)]
    for connection in connections:
        connection.settimeout(PATIENCE_SECONDS)
        connection.sendall(HALF)
    return connections


def check_others_are_answered(url):
    assert requests.get(f"{url}/health", timeout=1).ok
    assert requests.get(f"{url}/metrics", timeout=1).ok
    body = {"model": NAME, "prompt": "hello", "max_tokens": 3}
    assert requests.post(f"{url}/v1/completions", data=json.dumps(body), timeout=PATIENCE_SECONDS).ok


def test_three_hundred_half_open_connections_harm_nobody(model_dir, tmp_path):
    with served(model_dir, tmp_path, "--header-timeout", "4") as (url, log), ExitStack() as stack:
        check_others_are_answered(url)  # once, to be warm
        connections = half_open(stack, url, 300)
        check_others_are_answered(url)
        ends = [read_to_end(connection) for connection in connections]
        assert {end.split(b"\r\n")[0] for end in ends} == {b"HTTP/1.1 408 Request Timeout"}
        text = requests.get(f"{url}/metrics", timeout=PATIENCE_SECONDS).text
    assert 'statex_connections_timed_out_total{waiting_for="head"} 300.0' in text
    assert "statex_connections 1.0" in text
    assert log.stat().st_size < MOST_LOG_BYTES
    assert "295 more in 60 s" in log.read_text()


def test_more_connections_than_descriptors_harm_nobody(model_dir, tmp_path):
    with served(model_dir, tmp_path, "--header-timeout", "60", files=256) as (url, log), ExitStack() as stack:
        check_others_are_answered(url)
        half_open(stack, url, 600)
        for _ in range(3):
            check_others_are_answered(url)
        found = re.search(r"statex_connections (\d+)", requests.get(f"{url}/metrics", timeout=1).text)
        assert 50 < int(found[1]) < 200
    assert log.stat().st_size < MOST_LOG_BYTES
    assert "Traceback" not in log.read_text()
    assert "Too many open files" not in log.read_text()


def test_a_flood_of_garbage_writes_a_bounded_log(model_dir, tmp_path):
    with served(model_dir, tmp_path) as (url, log):
        host, port = url.removeprefix("http://").split(":")
        for _ in range(500):
            with socket.create_connection((host, int(port)), timeout=PATIENCE_SECONDS) as connection:
                connection.sendall(b"\x16\x03\x01\r\n\r\n")
                assert read_to_end(connection).startswith(b"HTTP/1.1 400")
        check_others_are_answered(url)
    assert log.stat().st_size < MOST_LOG_BYTES
    assert "495 more in 60 s" in log.read_text()
