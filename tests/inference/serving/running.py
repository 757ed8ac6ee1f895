"""A server on loopback in a thread of the test, a model that can be paused, and the expected answers."""

import json
import socket
import threading
import time
from contextlib import contextmanager

import requests

from statex_dist.data.tokenizer import BytesTokenizer
from statex_dist.inference.generate import generate_continuations
from statex_dist.inference.serving.app import build_app
from statex_dist.inference.serving.limits import Limits
from statex_dist.inference.serving.server import Server, address_of, bind
from statex_dist.inference.serving.service import Service

NAME = "tiny"
SEGMENT = 16
PATIENCE_SECONDS = 20

ENDLESS = {"prompt": "hello", "seed": 1, "max_tokens": 4096, "ignore_eos": True}
"""A request of several seconds: if its slot is free sooner, the server did not wait for its end. Its first token is a
character, and is sent."""


class RunningServer:
    """A server's address, and what tests ask of it."""

    def __init__(self, service, server, url):
        self.service, self.server, self.url = service, server, url
        self.error = None

    def post(self, **fields):
        """Send a request for a completion."""
        return requests.post(f"{self.url}/v1/completions", json={"model": NAME, **fields}, timeout=PATIENCE_SECONDS)

    @contextmanager
    def stream(self, **fields):
        """Send a request for a stream, and give the answer with only its head read."""
        body = {"model": NAME, "stream": True, **fields}
        with requests.post(f"{self.url}/v1/completions", json=body, stream=True, timeout=PATIENCE_SECONDS) as response:
            yield response

    def metrics(self):
        """Return every sample of ``/metrics``."""
        lines = requests.get(f"{self.url}/metrics", timeout=PATIENCE_SECONDS).text.splitlines()
        samples = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name.removeprefix("statex_"): float(value) for name, value in samples}

    def wait_for(self, **wanted):
        """Wait until metrics have these values."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (found := {name: self.metrics()[name] for name in wanted}) != wanted:
            assert time.monotonic() < deadline, found
            time.sleep(0.01)

    def outcomes(self):
        """Return the number of requests for each outcome that occurred."""
        found = {name: value for name, value in self.metrics().items() if name.startswith("requests_total")}
        return {name.split('"')[1]: value for name, value in found.items() if value}


@contextmanager
def serving(model, *, api_key=None, grace_seconds=5.0, tokenizer=None, **limits):
    """Run a server until the block ends."""
    limits = Limits(**{"max_batch_size": 4, **limits})
    service = Service(model, tokenizer or BytesTokenizer(), name=NAME, limits=limits, segment_length=SEGMENT)
    server = Server(build_app(service, api_key=api_key), service, grace_seconds=grace_seconds)
    listener = bind("127.0.0.1", 0)
    running = RunningServer(service, server, address_of(listener))
    ready = threading.Event()

    def run():
        try:
            server.run(listener, on_ready=ready.set)
        except Exception as error:
            running.error = error

    thread = threading.Thread(target=run)
    thread.start()
    assert ready.wait(PATIENCE_SECONDS)
    try:
        yield running
    finally:
        if thread.is_alive():
            server.request_stop()
        thread.join(PATIENCE_SECONDS)
        assert not thread.is_alive()


def connect(server):
    """Return a socket that is connected to a server."""
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=PATIENCE_SECONDS)


def read_to_end(connection):
    """Return what a server sends until it closes the connection."""
    pieces = []
    try:
        while piece := connection.recv(1 << 16):
            pieces.append(piece)
    except ConnectionResetError:
        pass  # closed with unread bytes of ours
    return b"".join(pieces)


def raw_request(body, *, version="1.1", headers=""):
    """Return a request for a completion as it goes over the wire."""
    text = json.dumps({"model": NAME, **body})
    head = f"POST /v1/completions HTTP/{version}\r\nHost: x\r\n{headers}Content-Length: {len(text)}\r\n\r\n"
    return (head + text).encode()


def send_and_leave(server, **fields):
    """Return the socket of a request whose answer the test does not read."""
    connection = connect(server)
    connection.sendall(raw_request(fields))
    return connection


class Gate:
    """Lets a model make a given number of forward passes, and holds it before the next."""

    def __init__(self, model, passes=0):
        self._passes = threading.Semaphore(passes)
        self._open = False
        model.register_forward_pre_hook(self._wait)

    def _wait(self, *_):
        if not self._open:
            self._passes.acquire()

    def open(self):
        """Hold the model no more."""
        self._open = True
        self._passes.release()


def alone(model, prompt, sampling, seed):
    """Return the text that a prompt is continued with when there is nothing else."""
    [(_, text)] = generate_continuations(
        model,
        [prompt],
        sampling,
        tokenizer=BytesTokenizer(),
        batch_size=1,
        segment_length=SEGMENT,
        seeds=[seed],
    )
    return text
