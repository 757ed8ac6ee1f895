"""OpenAI's completions API as far as it is spoken here: the request, the answer's bodies, and errors.

Source: the API reference of ``POST /v1/completions`` at platform.openai.com, and what its official Python client sends
and reads. A field that would change the answer and is not supported is refused, never passed over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, SkipValidation, ValidationError
from pydantic_core import from_json

from statex_dist import errors
from statex_dist.errors import StateXError

DEFAULT_MAX_TOKENS = 16
"""OpenAI's."""

MAX_STOPS = 4

MAX_STOP_CHARACTERS = 256
"""Characters of a stop string. Text that may become one is held back and compared again at every token."""

_MAX_SHOWN = 60


class RequestError(StateXError):
    """An answer that is an error.

    Args:
        status: HTTP status.
        message: What was given, what is allowed, what to do.
        param: The field that is wrong, if one is.
        code: For programs.
        headers: Of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, dict(headers or {})

    @property
    def outcome(self) -> str:
        """How a request that ends with it is counted."""
        outcomes = {408: "timeout", 429: "refused", 503: "refused", 504: "timeout"}
        return outcomes.get(self.status, "invalid" if self.status < 500 else "failed")

    def body(self) -> dict[str, Any]:
        """Return OpenAI's body of an error."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        if self.status == 429:
            kind = "rate_limit_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class BusyError(StateXError):
    """Slots and queue are full; the same request may be taken later."""


class StreamOptions(BaseModel):
    """Contents of a stream besides text."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    include_usage: bool = False
    include_obfuscation: bool = False
    """Random padding against guessing texts from packet lengths; only False is supported."""


class CompletionRequest(BaseModel):
    """The body of ``POST /v1/completions``. ``top_k`` and ``ignore_eos`` are ours; null stands for the default."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    model: str
    # A union's validator explains one mistake once for each of its types, and for each item of a list.
    prompt: SkipValidation[str | list[str] | list[int] | list[list[int]]]
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, lt=1 << 31)
    n: int | None = Field(None, ge=1)
    stop: SkipValidation[str | list[str] | None] = None
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    echo: bool | None = None
    ignore_eos: bool | None = None
    user: str | None = None
    # Only their neutral value is taken.
    best_of: int | None = None
    logprobs: int | None = None
    logit_bias: SkipValidation[Any] = None  # of any size, and refused
    suffix: str | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, one or more."""
        prompt: Any = self.prompt
        if isinstance(prompt, str) or isinstance(prompt[0], int):
            return [prompt]
        return prompt

    @property
    def num_choices(self) -> int:
        """Completions of each prompt."""
        return self.n or 1

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the token usage."""
        return self.stream_options is not None and self.stream_options.include_usage


def parse_request(body: bytes) -> CompletionRequest:
    """Return the request that a body holds.

    Raises:
        RequestError: It is none (400).
    """
    try:
        fields = from_json(body)
    except ValueError as error:
        # Of a pair of escapes for one character, the other half is missing.
        hint = " (a lone surrogate is no character)" if "hex escape" in str(error) else ""
        raise RequestError(400, f"the body is not valid JSON: {error}{hint}") from None
    if not isinstance(fields, dict):
        raise RequestError(400, f"the body is {shown(fields)}; give a JSON object")
    # By hand, up to the first: pydantic would collect as many mistakes as a client cares to send.
    _check_names(fields, CompletionRequest)
    options = fields.get("stream_options")
    if isinstance(options, dict):
        _check_names(options, StreamOptions, "stream_options.")
    try:
        request = CompletionRequest.model_validate(fields)
    except ValidationError as error:
        raise _explain(error) from None
    _check_prompt(request.prompt)
    _check_stop(request.stop)
    _refuse_unsupported(request)
    return request


def _check_names(fields: Mapping[str, Any], kind: type[BaseModel], place: str = "") -> None:
    for name in fields:
        if name not in kind.model_fields:
            known = ", ".join(kind.model_fields)
            param = place + (name if len(name) <= _MAX_SHOWN else name[:_MAX_SHOWN] + "...")
            text = f"unknown field {param!r}; known are {known}"
            raise RequestError(400, text, param=param, code="unknown_parameter")


def _check_prompt(prompt: Any) -> None:
    items = prompt if isinstance(prompt, list) else [prompt]
    kinds = {type(item) for item in items}
    if kinds == {list}:
        right = {type(item) for tokens in items for item in tokens} <= {int}
    else:
        right = kinds == {str} or (kinds == {int} and isinstance(prompt, list))
    if not right:
        text = "prompt must be a string, a list of strings, a list of token ids or a list of lists of token ids"
        raise RequestError(400, f"{text}, not {shown(prompt)}", param="prompt", code="invalid_type")


def _check_stop(stop: Any) -> None:
    if stop is None:
        return
    items = stop if isinstance(stop, list) else [stop]
    if len(items) > MAX_STOPS or not all(
        isinstance(item, str) and 0 < len(item) <= MAX_STOP_CHARACTERS for item in items
    ):
        text = f"stop must be a string or a list of up to {MAX_STOPS}, of 1 to {MAX_STOP_CHARACTERS} characters each"
        raise RequestError(400, f"{text}, not {shown(stop)}", param="stop", code="invalid_value")


def shown(value: Any) -> str:
    """Return a value as messages show it: of bounded length, however large it is."""
    return errors.shown(value, _MAX_SHOWN)


def _explain(error: ValidationError) -> RequestError:
    """Return the first mistake as one line."""
    first = error.errors(include_url=False, include_context=False)[0]
    param, kind = str(first["loc"][0]), first["type"]
    if kind == "missing":
        return RequestError(400, f"{param} is missing; give it", param=param, code=kind)
    return RequestError(400, f"{param}: {first['msg'].lower()}, not {shown(first['input'])}", param=param, code=kind)


def _refuse_unsupported(request: CompletionRequest) -> None:
    refused = {
        "best_of": (request.best_of not in (None, request.num_choices), "only n completions are drawn"),
        "logprobs": (request.logprobs is not None, "log probabilities are not given"),
        "logit_bias": (bool(request.logit_bias), "tokens are not weighted"),
        "suffix": (bool(request.suffix), "a recurrent model reads from the left only"),
        "presence_penalty": (bool(request.presence_penalty), "tokens are not weighted"),
        "frequency_penalty": (bool(request.frequency_penalty), "tokens are not weighted"),
        "stream_options": (
            request.stream_options is not None and request.stream_options.include_obfuscation,
            "streams are not padded (include_obfuscation)",
        ),
    }
    for name, (given, reason) in refused.items():
        if given:
            raise RequestError(400, f"{name} is not supported: {reason}; leave it out", param=name, code="unsupported")
    if request.stream_options is not None and not request.stream:
        raise RequestError(400, "stream_options go with stream: true only", param="stream_options")


def completion_body(
    head: Mapping[str, Any], choices: Sequence[Mapping[str, Any]], usage: Mapping[str, int] | None
) -> dict[str, Any]:
    """Return the body of an answer, or of a piece of a stream.

    Args:
        head: What all pieces of an answer share: id, time, model, seed.
        choices: Of :func:`choice_body`.
        usage: Of :func:`usage_body`; None in the pieces of a stream.
    """
    return {"object": "text_completion", **head, "choices": choices, "usage": usage}


def choice_body(index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
    """Return a completion, or a piece of one."""
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}


def usage_body(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Return what an answer used. A prompt counts once for all of its completions, the token that ends a text never."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
