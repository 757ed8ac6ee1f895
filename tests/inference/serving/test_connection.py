"""Connections that are slow, silent, half closed, too many, or no HTTP: each ends, and other clients are served."""

import logging
import re
import time
from contextlib import ExitStack
from http.client import HTTPResponse

import pytest
import requests

from statex_dist.inference.serving.limits import RESERVE, ServerMetrics
from tests.evaluation.stand_ins import tiny_model
from tests.inference.serving.running import (
    PATIENCE_SECONDS,
    Gate,
    connect,
    raw_request,
    read_to_end,
    send_and_leave,
    serving,
)

GET = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
CHUNKED = b" HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
SHORT = {"prompt": "hello", "max_tokens": 3, "ignore_eos": True}


@pytest.fixture(scope="module")
def server():
    with serving(tiny_model()) as running:
        yield running


@pytest.fixture(scope="module")
def hasty_server():
    """A server with short time-outs."""
    with serving(tiny_model(), header_timeout=0.3, body_timeout=0.3, keep_alive_timeout=0.3) as running:
        yield running


def exchange(server, *pieces, half_close=False):
    """Send pieces, and return everything that comes back until the server closes."""
    with connect(server) as connection:
        for piece in pieces:
            connection.sendall(piece)
        if half_close:
            connection.shutdown(1)
        return read_to_end(connection)


def statuses(received):
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", received)]


def timed_out(server, phase):
    return server.metrics()[f'connections_timed_out_total{{waiting_for="{phase}"}}']


@pytest.mark.parametrize(("sent", "answer"), [(b"", []), (b"GET /health HTTP/1.1\r\nHost: x\r\nA", [408])])
def test_a_head_that_does_not_arrive_ends_its_connection(hasty_server, sent, answer):
    before = timed_out(hasty_server, "head")
    assert statuses(exchange(hasty_server, sent)) == answer
    assert timed_out(hasty_server, "head") == before + 1


@pytest.mark.parametrize(
    ("head", "status"),
    [(b"GET /health HTTP/1.1\r\nHost: x\r\nA: ", 408), (b"POST /v1/completions" + CHUNKED, 408), (GET, 200)],
)
def test_single_bytes_give_no_more_time(hasty_server, head, status):
    """Also after an answer: uvicorn's time-out for idle connections ends with the first byte."""
    with connect(hasty_server) as connection:
        connection.sendall(head)
        deadline = time.monotonic() + PATIENCE_SECONDS
        try:
            while time.monotonic() < deadline:
                connection.sendall(b"1" if b"chunked" in head else b"G")
                time.sleep(0.02)
            pytest.fail("the connection is open")
        except (BrokenPipeError, ConnectionResetError):
            pass


@pytest.mark.parametrize("expect", ["", "Expect: 100-continue\r\n"])
def test_a_body_that_does_not_arrive_gets_408_and_the_end(hasty_server, expect):
    received = exchange(hasty_server, raw_request(SHORT, headers=expect)[:-5])
    assert statuses(received)[-1] == 408
    assert b"did not arrive in 0.3 s" in received


def test_a_body_that_nobody_waits_for_keeps_no_connection(hasty_server):
    assert statuses(exchange(hasty_server, GET[:-2] + b"Content-Length: 9\r\n\r\n")) == [200]


def test_an_idle_connection_is_closed_after_its_last_answer(hasty_server):
    assert statuses(exchange(hasty_server, GET, GET)) == [200, 200]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(
    "request_",
    [GET, raw_request(SHORT), raw_request({**SHORT, "stream": True})],
    ids=["health", "completion", "stream"],
)
def test_a_client_that_closed_its_sending_side_is_answered(server, request_, count):
    received = exchange(server, request_ * count, half_close=True)
    assert statuses(received) == [200] * count
    assert received.count(b'"length"') == (0 if request_ is GET else count)


def test_a_half_closed_client_of_http_1_0_is_answered_without_interim_responses():
    model = tiny_model()
    gate = Gate(model, passes=1)
    with serving(model) as server, connect(server) as connection:
        connection.sendall(raw_request(SHORT, version="1.0"))
        connection.shutdown(1)
        server.wait_for(running=1)
        time.sleep(1.2)  # two would have come
        gate.open()
        assert statuses(read_to_end(connection)) == [200]


def test_a_half_closed_client_that_waits_gets_signs_of_life_and_its_answer():
    model = tiny_model()
    gate = Gate(model)
    with serving(model) as server, connect(server) as connection:
        connection.sendall(raw_request(SHORT))
        connection.shutdown(1)
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 100 Continue\r\n\r\n")
        gate.open()
        response = HTTPResponse(connection)
        response.begin()  # passes over what comes before the answer
        assert response.status == 200
        assert b'"length"' in response.read()


def test_half_a_request_of_a_half_closed_client_has_no_answer(server):
    assert exchange(server, GET[:-3], half_close=True) == b""
    assert exchange(server, raw_request(SHORT)[:-3], half_close=True) == b""


NO_HTTP = {
    "garbage": [b"\x16\x03\x01\x02\x00" * 9 + b"\r\n\r\n"],
    "no version": [b"GET /health\r\n\r\n"],
    "HTTP/2": [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"],
    "HTTP/0.9": [b"GET /health HTTP/0.9\r\n\r\n"],
    "no host": [b"GET /health HTTP/1.1\r\n\r\n"],
    "long target": [b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n"],
    "very long target": [b"GET /" + b"a" * 2_000_000],
    "long header": [b"GET /health HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 20_000 + b"\r\n\r\n"],
    "very long header": [b"GET /health HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 2_000_000],
    "many headers": [b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 101 + b"\r\n"],
    "zero in header": [b"GET /health HTTP/1.1\r\nHost: x\r\nA: \0\r\n\r\n"],
    "negative length": [b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n"],
    "two lengths": [b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n"],
    "unknown coding": [b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n"],
    "bad chunk": [b"POST /v1/completions" + CHUNKED + b"zz\r\nabc\r\n"],
    "bad chunk later": [b"POST /v1/completions" + CHUNKED + b"3\r\nabc\r\n", b"-3\r\nabc\r\n"],
    "huge chunk": [b"POST /v1/completions" + CHUNKED + b"f" * 25 + b"\r\nabc\r\n"],
    "bad chunk of HEAD": [b"HEAD /health" + CHUNKED + b"zz\r\n"],
}


@pytest.mark.parametrize("pieces", NO_HTTP.values(), ids=NO_HTTP)
def test_what_is_no_http_is_refused_without_a_traceback(server, caplog, pieces):
    before = server.metrics()["bad_http_total"]
    try:
        found = statuses(exchange(server, *pieces))
    except (BrokenPipeError, ConnectionResetError):
        found = []  # closed while a large head was sent
    assert [status for status in found if not 400 <= status < 500] == []
    assert server.metrics()["bad_http_total"] == before + 1
    assert [record for record in caplog.records if record.exc_info or record.levelno >= logging.ERROR] == []


@pytest.mark.parametrize("good", [GET, raw_request(SHORT)])
def test_garbage_behind_a_request_takes_nothing_from_it(server, caplog, good):
    assert statuses(exchange(server, good + b"\0\1\2\r\n\r\n")) == [200, 400]
    assert [record for record in caplog.records if record.exc_info] == []


@pytest.mark.parametrize("method", [b"GET", b"HEAD"])
def test_garbage_behind_an_answer_ends_the_connection_without_a_traceback(server, caplog, method):
    with connect(server) as connection:
        connection.sendall(method + b" /health" + CHUNKED)
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")
        connection.sendall(b"zz\r\n")
        assert statuses(read_to_end(connection)) == []
    assert [record for record in caplog.records if record.exc_info] == []


def test_above_the_limit_requests_are_refused_and_health_is_not():
    model = tiny_model()
    gate = Gate(model, passes=2)
    with serving(model, max_connections=2) as server, ExitStack() as stack:
        for held in ({"running": 1}, {"running": 1, "waiting": 1}):
            stack.enter_context(send_and_leave(server, **{**SHORT, "max_tokens": 9}))
            server.wait_for(**held)
        for _ in range(2 * RESERVE):
            refused = exchange(server, raw_request(SHORT))
            assert statuses(refused) == [503]
            assert b"\r\nretry-after: 1\r\n" in refused.lower()
            assert b"too many connections" in refused
            assert requests.get(f"{server.url}/health", timeout=PATIENCE_SECONDS).ok
        assert server.metrics()["connections_refused_total"] == 2 * RESERVE
        gate.open()
        server.wait_for(**{'requests_total{outcome="ok"}': 2})
        assert server.post(**SHORT).ok


def test_who_waits_longest_for_its_client_gives_way():
    with serving(tiny_model(), max_connections=1) as server, ExitStack() as stack:
        # An idle one, one in its head, one in its body, and more of these.
        starts = [b"", GET[:-2], raw_request(SHORT)[:-2], *[GET[:9]] * (RESERVE - 2)]
        waiting = []
        for start in starts:
            waiting.append(stack.enter_context(connect(server)))
            waiting[-1].sendall(start)
        assert server.post(**SHORT).ok
        assert server.metrics()["connections_refused_total"] == 2
        # The first for its place as a connection, the third for that of its request.
        assert [statuses(read_to_end(waiting[i])) for i in (0, 2)] == [[], [503]]
        for connection, rest in ((waiting[1], GET[-2:]), (waiting[-1], GET[9:])):
            connection.sendall(rest)
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")


def test_a_client_that_does_not_read_its_metrics_is_cut(monkeypatch):
    with serving(tiny_model(), request_timeout=0.2) as server, connect(server) as connection:
        server.service.last_words_seconds = 0.1
        with monkeypatch.context() as patch:
            patch.setattr(ServerMetrics, "text", lambda self: b"#" * (16 << 20))
            connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 2)
            # The first answer is in the buffer, the second waits for it.
            time.sleep(0.1)
            requests.get(f"{server.url}/health", timeout=PATIENCE_SECONDS)
        server.wait_for(**{'connections_timed_out_total{waiting_for="answer"}': 1, "connections": 1})


@pytest.mark.parametrize("header", [b"", b"Connection: close\r\n"])
def test_a_connection_whose_last_answer_is_not_read_does_not_close_for_ever(monkeypatch, header):
    with (
        serving(tiny_model(), body_timeout=0.2, keep_alive_timeout=0.1) as server,
        connect(server) as connection,
    ):
        with monkeypatch.context() as patch:
            patch.setattr(ServerMetrics, "text", lambda self: b"#" * (16 << 20))
            connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n" + header + b"\r\n")
            assert connection.recv(1) == b"H"
        server.wait_for(**{'connections_timed_out_total{waiting_for="close"}': 1, "connections": 1})
