"""Servers on loopback for remote datasets: one that fails on request, and a real S3."""

from __future__ import annotations

import socket
import struct
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import requests

from statex_dist.data.formats import open_store
from statex_dist.data.manifest import LENGTHS_NAME, DatasetManifest, hash_lengths, pack_lengths

SLOW_DOWN = (
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)


class FaultyServer:
    """Serves a directory, or stands before another server, and fails where it is told to.

    Args:
        directory: What to serve.
        upstream: ``http://host:port`` to ask instead.

    Attributes:
        faults: For each file name what to do with its next requests, in order: a status to answer; ``"stall"`` (half
            the body, then nothing), ``"truncate"`` (half the body, then the end), ``"short"`` (the same, with no
            length announced), ``"reset"``, ``"flip"`` (one bit is wrong), ``None`` (answer as it should).
        always: The same for every request of a name.
        requests: Number of GET requests by file name.
        stalled: Set when a request stalls.
    """

    def __init__(self, directory: Path | None = None, upstream: str | None = None):
        self.directory = directory
        self.upstream = upstream
        self.faults: dict[str, list] = defaultdict(list)
        self.always: dict[str, object] = {}
        self.requests: Counter[str] = Counter()
        self.queries: list[str] = []
        self.logins: list[str] = []
        self.stalled = threading.Event()
        self._release = threading.Event()
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        self._release.set()
        self._http.shutdown()
        self._http.server_close()

    def let_go(self) -> None:
        """End the requests that stall."""
        self._release.set()

    def _next_fault(self, name: str, method: str):
        with self._lock:
            if method == "GET":
                self.requests[name] += 1
            if name in self.always:
                return self.always[name]
            return self.faults[name].pop(0) if self.faults[name] else None

    def _handler(server) -> type[BaseHTTPRequestHandler]:  # noqa: N805 - the handler has a self of its own
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_HEAD(self):
                self.answer()

            def do_GET(self):
                self.answer()

            def answer(self):
                parts = urlsplit(self.path)
                name = unquote(parts.path).rpartition("/")[2]
                server.queries.append(parts.query)
                server.logins.append(self.headers.get("Authorization", ""))
                fault = server._next_fault(name, self.command)
                if fault == "reset":
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.close_connection = True
                    self.connection.close()
                    return
                if isinstance(fault, int):
                    self.reply(fault, {}, SLOW_DOWN, None)
                    return
                self.reply(*server._content(self.command, self.path, unquote(parts.path), self.headers), fault)

            def reply(self, status, headers, body, fault):
                self.send_response(status)
                for key, value in headers.items():
                    self.send_header(key, value)
                if fault != "short" and "Content-Length" not in headers:
                    self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command == "HEAD":
                    return
                if fault == "flip":
                    body = bytes([*body[:-1], body[-1] ^ 1])
                half = fault in ("stall", "truncate", "short")
                self.wfile.write(body[: len(body) // 2] if half else body)
                self.wfile.flush()
                if fault == "stall":
                    server.stalled.set()
                    server._release.wait(60)

            def finish(self):
                with suppress(OSError):  # it was reset
                    super().finish()

        return Handler

    def _content(self, method: str, target: str, path: str, headers):
        if self.upstream is not None:
            keep = {k: v for k, v in headers.items() if k.lower() not in ("host", "connection")}
            found = requests.request(method, self.upstream + target, headers=keep, timeout=30)
            drop = ("transfer-encoding", "connection", "content-encoding", "server", "date")
            return found.status_code, {k: v for k, v in found.headers.items() if k.lower() not in drop}, found.content
        file = self.directory / path.lstrip("/")
        if not file.is_file():
            return 404, {"X-Error-Code": "EntryNotFound"}, b"no such file"
        # These headers are Hugging Face's.
        return 200, {"ETag": f'"{file.stat().st_size}"', "X-Repo-Commit": "0" * 40}, file.read_bytes()


@contextmanager
def serve(directory: Path | None = None, upstream: str | None = None) -> Iterator[FaultyServer]:
    server = FaultyServer(directory, upstream)
    try:
        yield server
    finally:
        server.close()


@contextmanager
def s3_server() -> Iterator[str]:
    """A real S3 server in this process; yields its endpoint."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def write_manifest(directory: Path) -> Path:
    """Add what ``prepare`` writes beside the shards, so that opening the dataset fetches none of them."""
    store = open_store(directory)
    lengths = [store.lengths(shard) for shard in range(store.num_shards)]
    every = np.concatenate(lengths)
    (directory / LENGTHS_NAME).write_bytes(pack_lengths(every))
    DatasetManifest(
        format="mds",
        tokenizer="bytes",
        tokenizer_hash="",
        vocab_size=257,
        eos_token_id=256,
        eos="append",
        documents=len(every),
        tokens=int(every.sum()),
        dtype="uint16",
        loss_mask=False,
        seed=0,
        shard_documents=[len(part) for part in lengths],
        shard_tokens=[int(part.sum()) for part in lengths],
        lengths_hash=hash_lengths(every),
        length_histogram=[],
        left_out={},
    ).write(directory)
    return directory


def upload(directory: Path, endpoint: str, bucket: str, prefix: str, acl: str = "private") -> str:
    """Put the files of ``directory`` into a bucket; returns the URL of the directory."""
    import boto3

    client = boto3.client("s3", endpoint_url=endpoint)
    client.create_bucket(Bucket=bucket)
    for file in directory.iterdir():
        client.upload_file(str(file), bucket, f"{prefix}/{file.name}", ExtraArgs={"ACL": acl})
    return f"s3://{bucket}/{prefix}"
