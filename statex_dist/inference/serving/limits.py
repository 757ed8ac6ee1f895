"""What the server takes: its limits, and requests as tokens that are within them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from statex_dist.data.tokenizer import Tokenizer
from statex_dist.errors import ConfigError
from statex_dist.inference.serving.protocol import DEFAULT_MAX_TOKENS, CompletionRequest, RequestError
from statex_dist.inference.serving.rlimit import DEFAULT_MAX_CONNECTIONS

CHARACTERS_PER_TOKEN = 16
"""A text with more characters than so many times the tokens allowed is refused before it is tokenized: English has 4 or
5 in a token of a large vocabulary, source code up to 10, and only long rows of one character have more than this."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What is taken.

    Attributes:
        max_batch_size: Completions that are read and written together: slots.
        max_queue: Completions that wait for a slot.
        max_prompt_tokens: Tokens of a prompt.
        max_tokens: Tokens of a completion.
        max_body_bytes: Bytes of a request's body.
        request_timeout: Seconds from a request's arrival to the end of its answer.
        max_connections: Connections that are open, but for a few more.
        header_timeout: Seconds for the head of a request to arrive.
        body_timeout: Seconds for the body to arrive after the head.
        keep_alive_timeout: Seconds from an answer to the next request of the connection.
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

    def __post_init__(self) -> None:
        for field in fields(self):
            name, value = f"--{field.name.replace('_', '-')}", getattr(self, field.name)
            least = 0 if field.name == "max_queue" else 1
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


def _refused(param: str, message: str, *, code: str = "invalid_value") -> RequestError:
    return RequestError(400, message, param=param, code=code)
