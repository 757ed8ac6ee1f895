"""What the server tells Prometheus: the only importer of ``prometheus_client``."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from statex_dist.inference.serving.batch import ContinuousBatch, Turn

OUTCOMES = ("ok", "invalid", "refused", "timeout", "disconnected", "failed")
"""How requests end: answered; wrong (4xx); without a place (429, 503); out of time; their client left; by our fault."""

_FIRST_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_TOKEN_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Metrics:
    """Counters of one server, each with its own registry: several servers may live in a process.

    Args:
        batch: Asked at every scrape for what it holds.
        waiting: Rows that wait for a slot, likewise.
        preparing: Requests that are parsed and tokenized or wait for it, likewise.
    """

    CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self, batch: ContinuousBatch, waiting: Callable[[], int], preparing: Callable[[], int]):
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._requests = Counter("statex_requests", "Requests for completions", ["outcome"], registry=registry)
        for outcome in OUTCOMES:
            self._requests.labels(outcome)
        self._prompt_tokens = Counter("statex_prompt_tokens", "Tokens of prompts that were read", registry=registry)
        self._generated_tokens = Counter("statex_generated_tokens", "Tokens that were produced", registry=registry)
        self._first_token = Histogram(
            "statex_time_to_first_token_seconds",
            "From a request's arrival to its first token",
            buckets=_FIRST_TOKEN_BUCKETS,
            registry=registry,
        )
        self._per_token = Histogram(
            "statex_time_per_output_token_seconds",
            "From a token to the next of the same completion",
            buckets=_TOKEN_BUCKETS,
            registry=registry,
        )
        self._batch_size = Histogram(
            "statex_batch_size", "Completions that took a step together", buckets=_BATCH_BUCKETS, registry=registry
        )
        self._connections = Gauge("statex_connections", "Open connections", registry=registry)
        self._refused_connections = Counter(
            "statex_connections_refused",
            "Connections that got 503 or were cut because the limit was reached",
            registry=registry,
        )
        self._timed_out_connections = Counter(
            "statex_connections_timed_out",
            "Connections that were cut because what they waited for did not come",
            ["waiting_for"],
            registry=registry,
        )
        for phase in ("head", "body", "answer", "close"):
            self._timed_out_connections.labels(phase)
        self._bad_http = Counter("statex_bad_http", "Requests that were no HTTP, or too large", registry=registry)
        gauges: dict[str, tuple[str, Callable[[], int]]] = {
            "statex_running": ("Completions that are being written", lambda: batch.running),
            "statex_reading": (
                "Completions whose prompt is being read, or is read while their slots are not free yet",
                lambda: batch.reading,
            ),
            "statex_waiting": ("Completions whose prompt waits for a slot", waiting),
            "statex_preparing": ("Requests that are parsed and tokenized, or wait for it", preparing),
            "statex_state_bytes": ("Bytes of the states of running completions", lambda: batch.state_bytes),
        }
        for name, (text, value) in gauges.items():
            Gauge(name, text, registry=registry).set_function(value)

    def count(self, outcome: str) -> None:
        """Count a request that ended."""
        assert outcome in OUTCOMES, outcome
        self._requests.labels(outcome).inc()

    def see_turn(self, turn: Turn) -> None:
        """Count what a turn did."""
        self._prompt_tokens.inc(turn.tokens_read)
        self._generated_tokens.inc(sum(progress.token is not None for progress in turn.progress))
        if turn.rows:
            self._batch_size.observe(turn.rows)

    def see_first_token(self, seconds: float) -> None:
        """Record how long a request waited for its first token."""
        self._first_token.observe(seconds)

    def see_token(self, seconds: float) -> None:
        """Record how long a completion waited for its next token."""
        self._per_token.observe(seconds)

    def see_connections(self, number: int) -> None:
        """Record how many connections are open."""
        self._connections.set(number)

    def count_refused_connection(self) -> None:
        """Count a connection for which there was no place."""
        self._refused_connections.inc()

    def count_timed_out_connection(self, waiting_for: str) -> None:
        """Count a connection that waited too long for a ``head``, a ``body``, an ``answer`` to be read, or to close."""
        self._timed_out_connections.labels(waiting_for).inc()

    def count_bad_http(self) -> None:
        """Count a request that no route can answer."""
        self._bad_http.inc()

    def text(self) -> bytes:
        """Return everything in Prometheus' text format."""
        return generate_latest(self._registry)
