"""Limits of requests, connections and waiting work, and the metrics of the server.

The only importer of ``prometheus_client``.
"""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from statex_dist.data.tokenizer import Tokenizer
from statex_dist.errors import ConfigError
from statex_dist.inference.serving.batch import BatchStepResult, ContinuousBatch
from statex_dist.inference.serving.protocol import DEFAULT_MAX_TOKENS, BusyError, CompletionRequest, RequestError

DEFAULT_MAX_CONNECTIONS = 1024

CHARACTERS_PER_TOKEN = 16
"""Characters for each allowed token. The server refuses a text with more characters before it tokenizes the text.
English has 4 or 5 characters in a token of a large vocabulary, source code up to 10. Only long rows of one character
have more than this number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Limits of the requests that the server accepts.

    Attributes:
        max_batch_size: Completions that are read and written together: slots.
        max_queue: Completions that wait for a slot.
        max_prompt_tokens: Tokens of a prompt.
        max_tokens: Tokens of a completion.
        max_body_bytes: Bytes of a request's body.
        request_timeout: Seconds from a request's arrival to the end of its answer.
        max_connections: Open connections, apart from a small reserve.
        header_timeout: Seconds for the head of a request to arrive.
        body_timeout: Seconds for the body to arrive after the head.
        keep_alive_timeout: Seconds from an answer to the next request of the connection.
        max_kv_bytes: Bytes of a hybrid's keys and values, of all slots together; None for any number.
    """

    max_batch_size: int = 32
    max_queue: int = 256
    max_prompt_tokens: int = 131_072
    max_tokens: int = 4096
    max_body_bytes: int = 2 << 20
    request_timeout: float = 300.0
    max_connections: int = DEFAULT_MAX_CONNECTIONS
    header_timeout: float = 10.0
    body_timeout: float = 30.0
    keep_alive_timeout: float = 5.0
    max_kv_bytes: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            name, value = f"--{field.name.replace('_', '-')}", getattr(self, field.name)
            least = 0 if field.name == "max_queue" else 1
            if value is None:
                continue
            if field.name.endswith("_timeout"):
                if not 0 < value < float("inf"):
                    raise ConfigError(f"{name} must be above 0 seconds, not {value:g}")
            elif value < least:
                raise ConfigError(f"{name} must be {least} or more, not {value}")

    @property
    def max_open(self) -> int:
        """Completions that have a slot or wait for one."""
        return self.max_batch_size + self.max_queue

    def check(self, request: CompletionRequest) -> None:
        """Raise if a request asks for more completions or tokens than it could ever get.

        Raises:
            RequestError: It does (400).
        """
        most = self.max_tokens
        if request.max_tokens is not None and request.max_tokens > most:
            raise _refused("max_tokens", f"max_tokens must be at most {most}, not {request.max_tokens}")
        if request.num_choices > self.max_batch_size:
            raise _refused("n", f"n must be at most {self.max_batch_size}, not {request.num_choices}")
        rows = len(request.prompts) * request.num_choices
        if rows > self.max_open:
            raise _refused("prompt", f"{rows} completions are too many for a request; allowed: {self.max_open}")

    def completion_tokens(self, request: CompletionRequest) -> int:
        """Return the tokens of a completion at most."""
        return request.max_tokens or min(DEFAULT_MAX_TOKENS, self.max_tokens)

    def encode(self, prompts: Sequence[str | Sequence[int]], tokenizer: Tokenizer, vocab_size: int) -> list[list[int]]:
        """Return the tokens of prompts. It takes its time for a long text.

        Args:
            prompts: Texts or tokens.
            tokenizer: The model's.
            vocab_size: The model's.

        Raises:
            RequestError: A prompt is empty or too long, or a token is not in the vocabulary (400).
        """
        encoded = []
        for prompt in prompts:
            most = CHARACTERS_PER_TOKEN * self.max_prompt_tokens
            if isinstance(prompt, str) and len(prompt) > most:
                text = f"the prompt has {len(prompt)} characters; allowed are {most} ({CHARACTERS_PER_TOKEN} a token)"
                raise _refused("prompt", f"{text}: shorten it", code="context_length_exceeded")
            tokens = tokenizer.encode(prompt).tolist() if isinstance(prompt, str) else prompt
            if not tokens:
                raise _refused("prompt", "the prompt has no tokens; give one or more")
            if len(tokens) > self.max_prompt_tokens:
                text = f"the prompt has {len(tokens)} tokens; allowed are {self.max_prompt_tokens}: shorten it"
                raise _refused("prompt", text, code="context_length_exceeded")
            if not 0 <= min(tokens) <= max(tokens) < vocab_size:
                wrong = next(token for token in tokens if not 0 <= token < vocab_size)
                raise _refused("prompt", f"token {wrong} is not in the vocabulary; allowed: 0 to {vocab_size - 1}")
            encoded.append(list(tokens))
        return encoded


def check_key_values(
    request: CompletionRequest, prompts: Sequence[Sequence[int]], max_tokens: int, allowed: int | None
) -> None:
    """Raise if the keys and values of a prompt's completions could never be kept at once.

    Args:
        request: The request.
        prompts: Tokens of its prompts.
        max_tokens: Tokens of a completion at most.
        allowed: Tokens whose keys and values are kept; None for any number.

    Raises:
        RequestError: They could not (400).
    """
    longest = max(map(len, prompts))
    needed = request.num_choices * (longest + max_tokens)
    if allowed is not None and needed > allowed:
        asked = f"n {request.num_choices}, a prompt of {longest} tokens and max_tokens {max_tokens}"
        text = f"{asked} need keys and values of {needed} tokens; there is memory for {allowed}"
        raise _refused("prompt", f"{text}: lower one of them", code="context_length_exceeded")


def _refused(param: str, message: str, *, code: str = "invalid_value") -> RequestError:
    return RequestError(400, message, param=param, code=code)


RESERVE = 16
"""Connections beyond the limit, so that a request for /health or /metrics has a place when the limit is reached."""

ACCEPTS_AT_ONCE = 8
"""Connections that the event loop accepts in one turn. One that is cut gives its descriptor back four turns later."""

_OTHER = 64
"""Files that are opened after the start: the model's, the event loop's, GPU devices."""


def connections_allowed(wanted: int | None) -> int:
    """Return how many connections may be open at a time.

    Args:
        wanted: Of ``--max-connections``, or None for the default (less where the limit of open files allows less).

    Raises:
        ConfigError: The limit of open files is too small (``RLIMIT_NOFILE``).
    """
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = len(list(Path("/dev/fd").iterdir())) + _OTHER + RESERVE + 4 * ACCEPTS_AT_ONCE
    allowed = DEFAULT_MAX_CONNECTIONS if files == resource.RLIM_INFINITY else files - needed
    if allowed < 1:
        raise ConfigError(f"the process may open {files} files, serve needs {needed + 1} or more; raise `ulimit -n`")
    if wanted is None:
        return min(DEFAULT_MAX_CONNECTIONS, allowed)
    if wanted > allowed and files != resource.RLIM_INFINITY:
        raise ConfigError(
            f"--max-connections {wanted} needs {wanted + needed} open files, the process may open {files}; "
            f"raise `ulimit -n`, or give at most {allowed}"
        )
    return wanted


T = TypeVar("T")


class BoundedExecutor:
    """Does one piece of work after the other, first come, first served. It belongs to the event loop.

    Work whose caller is cancelled is not begun; where it has begun, the next waits for its end all the same.

    Args:
        name: Of the thread.
        places: Pieces of work that may wait.
    """

    def __init__(self, name: str, *, places: int):
        self._name, self._places, self._open = name, places, 0
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._turn = asyncio.Semaphore(1)

    def __len__(self) -> int:
        """Return the pieces of work that are done or wait."""
        return self._open

    async def run(self, work: Callable[[], T]) -> T:
        """Return what ``work`` returns.

        Raises:
            BusyError: No place is free.
        """
        if self._open > self._places:
            raise BusyError(f"{self._open} {self._name} are being prepared or wait for it")
        self._open += 1
        try:
            await self._turn.acquire()
        except asyncio.CancelledError:
            self._open -= 1
            raise
        done = asyncio.get_running_loop().run_in_executor(self._executor, work)
        done.add_done_callback(self._end)
        return await asyncio.shield(done)

    def _end(self, done: asyncio.Future[T]) -> None:
        self._open -= 1
        self._turn.release()


OUTCOMES = ("ok", "invalid", "refused", "timeout", "disconnected", "failed")
"""How requests end: answered; wrong (4xx); without a place (429, 503); out of time; their client left; by our fault."""

_FIRST_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_TOKEN_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class ServerMetrics:
    """Counters of one server, each with its own registry: several servers may live in a process.

    Args:
        batch: Its sizes are read at every scrape.
        waiting: Rows that wait for a slot, likewise.
        preparing: Requests that are parsed and tokenized or wait for it, likewise.

    Attributes:
        first_token: Seconds that a request waited for its first token.
        per_token: Seconds that a completion waited for its next token.
        connections: Open connections.
        refused_connections: Connections for which there was no place.
        timed_out_connections: By phase: ``head``, ``body``, ``answer`` (to be read) or ``close``.
        bad_http: Requests that no route can answer.
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
        self.first_token = Histogram(
            "statex_time_to_first_token_seconds",
            "From a request's arrival to its first token",
            buckets=_FIRST_TOKEN_BUCKETS,
            registry=registry,
        )
        self.per_token = Histogram(
            "statex_time_per_output_token_seconds",
            "From a token to the next of the same completion",
            buckets=_TOKEN_BUCKETS,
            registry=registry,
        )
        self._batch_size = Histogram(
            "statex_batch_size", "Completions that took a step together", buckets=_BATCH_BUCKETS, registry=registry
        )
        self.connections = Gauge("statex_connections", "Open connections", registry=registry)
        self.refused_connections = Counter(
            "statex_connections_refused",
            "Connections that got 503 or were cut because the limit was reached",
            registry=registry,
        )
        self.timed_out_connections = Counter(
            "statex_connections_timed_out",
            "Connections that were cut because what they waited for did not come",
            ["waiting_for"],
            registry=registry,
        )
        for phase in ("head", "body", "answer", "close"):
            self.timed_out_connections.labels(phase)
        self.bad_http = Counter("statex_bad_http", "Requests that were no HTTP, or too large", registry=registry)
        gauges: dict[str, tuple[str, Callable[[], int]]] = {
            "statex_running": ("Completions that are being written", lambda: batch.running),
            "statex_reading": (
                "Completions whose prompt is being read, or is read while their slots are not free yet",
                lambda: batch.reading,
            ),
            "statex_waiting": ("Completions whose prompt waits for a slot", waiting),
            "statex_preparing": ("Requests that are parsed and tokenized, or wait for it", preparing),
            "statex_state_bytes": ("Bytes of the states of running completions", lambda: batch.state_bytes),
            "statex_key_value_bytes": ("Those of them that are keys and values", lambda: batch.key_value_bytes),
        }
        for name, (text, value) in gauges.items():
            Gauge(name, text, registry=registry).set_function(value)

    def count(self, outcome: str) -> None:
        """Count a request that ended."""
        assert outcome in OUTCOMES, outcome
        self._requests.labels(outcome).inc()

    def see_step(self, result: BatchStepResult) -> None:
        """Count what an iteration did."""
        self._prompt_tokens.inc(result.tokens_read)
        self._generated_tokens.inc(sum(progress.token is not None for progress in result.progress))
        if result.rows:
            self._batch_size.observe(result.rows)

    def text(self) -> bytes:
        """Return everything in Prometheus' text format."""
        return generate_latest(self._registry)
