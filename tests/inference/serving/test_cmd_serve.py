"""``statex serve`` from the user's view: the real process, its start, its end, and its refusals."""

import signal
import socket
import subprocess
import sys

import pytest
import requests

from launch.cli import main
from statex_dist.data.tokenizer import BytesTokenizer
from statex_dist.models.hf import save_pretrained
from tests.evaluation.stand_ins import tiny_model
from tests.inference.serving.running import PATIENCE_SECONDS
from tests.runs import REPOSITORY, environment


@pytest.fixture
def model_dir(tmp_path):
    directory = tmp_path / "small model"
    directory.mkdir()
    save_pretrained(tiny_model(), directory)
    BytesTokenizer().save(directory)
    return directory


def test_a_server_says_where_it_is_and_ends_orderly(model_dir):
    command = [sys.executable, "-m", "launch.cli", "serve", "--model", str(model_dir), "--port", "0"]
    process = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env={**environment(), "STATEX_API_KEY": "secret"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        line = process.stdout.readline()
        assert "32 slots, 1.25 KiB of state each, 40.00 KiB in all" in line
        name, url = line.split(": ")[0].split(" at ")
        assert name == "small model"
        assert requests.get(f"{url}/v1/models", timeout=PATIENCE_SECONDS).status_code == 401
        with requests.post(
            f"{url}/v1/completions",
            json={"model": name, "prompt": "a", "max_tokens": 500, "ignore_eos": True, "stream": True},
            headers={"Authorization": "Bearer secret"},
            stream=True,
            timeout=PATIENCE_SECONDS,
        ) as response:
            lines = response.iter_lines()
            assert next(lines).startswith(b'data: {"object":"text_completion"')
            process.send_signal(signal.SIGTERM)
            assert [line for line in lines if line][-1] == b"data: [DONE]"
        assert process.wait(PATIENCE_SECONDS) == 0
        assert "stopping:" in process.stderr.read()
    finally:
        process.kill()
        process.communicate()


def refused(capsys, *arguments):
    """Run a command that must be refused as wrong usage and return its one line."""
    assert main(["serve", "--model", "nowhere", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def test_a_port_in_use_is_said_before_the_model_is_looked_for(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        line = refused(capsys, "--port", port)
    assert line == f"error: port {port} of 127.0.0.1 is in use; choose another with --port, or --port 0 for a free one"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--port", "65536"], "--port must be 0 to 65535, not 65536"),
        (["--host", "203.0.113.1", "--port", "0"], "cannot listen on port 0 of 203.0.113.1: "),
        (["--host", "a" * 99, "--port", "0"], "is no host name"),
        (["--max-queue", "-1"], "--max-queue must be 0 or more, not -1"),
        (["--header-timeout", "0"], "--header-timeout must be above 0 seconds, not 0"),
        (["--body-timeout", ".inf"], "--body-timeout must be above 0 seconds, not inf"),
        (["--keep-alive-timeout", ".nan"], "--keep-alive-timeout must be above 0 seconds, not nan"),
        (["--max-connections", "0"], "--max-connections must be 1 or more, not 0"),
        (["--max-connections", "1000000000"], "--max-connections 1000000000 needs 1000000"),
        (["--grace-period", "-1"], "--grace-period must be 0 seconds or more, not -1"),
        (["--api-key", ""], "the key of --api-key or STATEX_API_KEY is empty; give one, or neither for no lock"),
        (["--port", "0"], "nowhere"),
    ],
)
def test_wrong_options_are_refused_in_one_line(capsys, arguments, words):
    assert words in refused(capsys, *arguments)


def test_an_empty_key_in_the_environment_is_no_open_door(capsys, monkeypatch):
    monkeypatch.setenv("STATEX_API_KEY", "")
    assert "STATEX_API_KEY is empty" in refused(capsys)


def test_the_missing_framework_is_named_with_the_way_to_get_it(capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "statex_dist.inference.serving.server", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    line = refused(capsys)
    assert "serve needs a web framework" in line
    assert line.endswith("run: .venv/bin/pip install -e '.[serve]'")
