"""Clients that are a burden: slow to parse, gone before they are answered, deaf or mute; and who is served first."""

import functools
import gc
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from statex_dist.inference.serving import app as reply
from statex_dist.inference.serving import service
from statex_dist.inference.serving.protocol import parse_request
from tests.evaluation.stand_ins import tiny_model
from tests.inference.serving.running import ENDLESS, PATIENCE_SECONDS, Gate, send_and_leave, serving


def hold_parsing(monkeypatch):
    """Hold the parsing of bodies that say "slow" until the event that is returned."""
    go = threading.Event()

    def parse(body):
        assert b"slow" not in body or go.wait(PATIENCE_SECONDS)
        return parse_request(body)

    monkeypatch.setattr(service, "parse_request", parse)
    return go


def test_requests_that_are_prepared_hold_up_nobody_else_and_free_their_places(monkeypatch):
    go = hold_parsing(monkeypatch)
    monkeypatch.setattr(service, "SHORT_BODY_BYTES", 500)
    with serving(tiny_model(), max_batch_size=1, max_queue=0) as server:
        parsed, waiting = (send_and_leave(server, prompt="slow") for _ in range(2))
        server.wait_for(preparing=2)  # and the event loop answers
        refused = server.post(prompt="a")
        assert (refused.status_code, refused.headers["Retry-After"]) == (429, "1")
        assert "2 requests" in refused.json()["error"]["message"]
        assert server.post(prompt="a" * 500, max_tokens=1).ok  # long ones have their own lane
        waiting.close()
        server.wait_for(preparing=1)
        parsed.close()
        server.wait_for(**{'requests_total{outcome="disconnected"}': 2})
        assert server.metrics()["preparing"] == 1  # its thread is not back
        go.set()
        assert server.post(prompt="a", max_tokens=1).ok
        server.wait_for(preparing=0)


def test_slow_preparation_is_not_the_fault_of_the_client(monkeypatch):
    go = hold_parsing(monkeypatch)
    with serving(tiny_model(), request_timeout=0.2) as server:
        late = server.post(prompt="slow")
        go.set()
    assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")


def fill_buffers(monkeypatch):
    """Make every answer larger than what connections hold, so that a client that does not read blocks who sends."""
    monkeypatch.setattr(reply.SseWriter, "_echo", lambda self, index: "a" * (16 << 20))


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_does_not_read_is_cut_after_the_deadline(monkeypatch, caplog, stream):
    fill_buffers(monkeypatch)
    with serving(tiny_model(), request_timeout=0.6, max_tokens=1 << 30) as server:
        server.service.last_words_seconds = 1.5
        fields = {**ENDLESS, "max_tokens": 1 << 30} if stream else {"prompt": "a", "max_tokens": 1}
        connection = send_and_leave(server, stream=stream, **fields)
        server.wait_for(prompt_tokens_total=len(fields["prompt"]))
        server.wait_for(running=0)
        assert server.outcomes() == {}  # slots are free before
        server.wait_for(**{'requests_total{outcome="timeout"}': 1})
        received = sum(map(len, iter(functools.partial(connection.recv, 1 << 20), b"")))
        assert 0 < received < 16 << 20
    assert "ASGI" not in caplog.text


def test_clients_that_do_not_read_or_write_do_not_keep_a_stopping_server(monkeypatch, caplog):
    fill_buffers(monkeypatch)
    with serving(tiny_model(), grace_seconds=0.1, max_tokens=1 << 30) as server:
        server.service.last_words_seconds = 0.2
        deaf = send_and_leave(server, **{**ENDLESS, "max_tokens": 1 << 30}, stream=True)
        mute = socket.create_connection(server.url.removeprefix("http://").split(":"))
        mute.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        server.wait_for(running=1)
    assert server.error is None
    assert "cutting 2 connections" in caplog.text
    assert "ASGI" not in caplog.text
    deaf.close()
    mute.close()


def test_what_is_there_before_the_first_request_is_not_collected():
    """Or a body of many lists would make the collector hold up all threads."""
    with serving(tiny_model()):
        assert gc.get_freeze_count() > 10_000
    assert gc.get_freeze_count() == 0


def test_prompts_are_read_as_they_came():
    model = tiny_model()
    read = []
    model.register_forward_pre_hook(lambda _, arguments: read.append(arguments[0].shape[1]))
    gate = Gate(model, passes=2)
    with serving(model, max_batch_size=1) as server, ThreadPoolExecutor() as pool:
        running = send_and_leave(server, **ENDLESS)
        server.wait_for(running=1)
        answers = []
        for i, prompt in enumerate(["aa", "aaa", "aaaa"]):
            answers.append(pool.submit(server.post, prompt=prompt, max_tokens=1))
            server.wait_for(waiting=i + 1)
        running.close()
        server.wait_for(**{'requests_total{outcome="disconnected"}': 1})
        gate.open()
        assert all(answer.result().ok for answer in answers)
    assert [length for length in read if length > 1] == [5, 2, 3, 4]
