"""``statex serve``: an HTTP server of completions with OpenAI's API."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser

from launch.model_options import add_dtype_option, add_model_options, load_for_decoding
from launch.tool_options import size
from statex_dist.errors import ConfigError

if TYPE_CHECKING:
    from statex_dist.inference.serving.limits import Limits
    from statex_dist.models.lm import RecurrentLM

API_KEY_VARIABLE = "STATEX_API_KEY"


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of ``statex serve`` to ``parser``."""
    add_model_options(parser)
    add_dtype_option(parser)
    parser.add_argument("--host", type=str, default="127.0.0.1", help="address to listen on (0.0.0.0: all)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (0: a free one)")
    parser.add_argument(
        "--served-model-name",
        type=str | None,
        default=None,
        help="what requests call it (default: its directory's name)",
    )
    parser.add_argument(
        "--api-key", type=str | None, default=None, help=f"key that clients must send (default: {API_KEY_VARIABLE})"
    )
    parser.add_argument("--max-batch-size", type=int, default=32, help="completions that are written together")
    parser.add_argument("--max-queue", type=int, default=256, help="completions that wait; more are refused")
    parser.add_argument("--max-prompt-tokens", type=int, default=131_072, help="tokens of a prompt at most")
    parser.add_argument("--max-tokens", type=int, default=4096, help="tokens of a completion at most")
    parser.add_argument(
        "--max-kv-bytes",
        type=int | None,
        default=None,
        help="bytes of a hybrid's keys and values, of all slots together (default: half of the memory that is free)",
    )
    parser.add_argument("--max-body-bytes", type=int, default=2 << 20, help="bytes of a request at most")
    parser.add_argument("--request-timeout", type=float, default=300.0, help="seconds for a request, waiting included")
    parser.add_argument("--header-timeout", type=float, default=10.0, help="seconds for a request's head to arrive")
    parser.add_argument(
        "--body-timeout", type=float, default=30.0, help="seconds for the body to arrive after the head"
    )
    parser.add_argument(
        "--keep-alive-timeout", type=float, default=5.0, help="seconds that a connection may be idle between requests"
    )
    parser.add_argument(
        "--max-connections",
        type=int | None,
        default=None,
        help="connections at a time (default: 1024, or what `ulimit -n` leaves); /health and /metrics have 16 more",
    )
    parser.add_argument("--grace-period", type=float, default=30.0, help="seconds for open requests at SIGTERM")


def run(args: Any) -> int:
    """Serve until SIGTERM or SIGINT.

    Args:
        args: The parsed options of :func:`add_arguments`.

    Raises:
        StateXError: The options, the port or the model are wrong, a package is missing, or the decoding thread died.
    """
    try:
        from statex_dist.inference.memory import key_value_budget
        from statex_dist.inference.serving.app import build_app
        from statex_dist.inference.serving.limits import Limits, connections_allowed
        from statex_dist.inference.serving.server import Server, address_of, bind
        from statex_dist.inference.serving.service import Service
        from statex_dist.inference.vocabulary import log_end_tokens
    except ModuleNotFoundError as error:
        raise ConfigError(f"serve needs a web framework ({error}); run: .venv/bin/pip install -e '.[serve]'") from None

    given = {field.name: getattr(args, field.name) for field in fields(Limits)}
    limits = Limits(**{**given, "max_connections": connections_allowed(args.max_connections)})
    if not 0 <= args.grace_period < float("inf"):
        raise ConfigError(f"--grace-period must be 0 seconds or more, not {args.grace_period:g}")
    api_key = args.api_key if args.api_key is not None else os.environ.get(API_KEY_VARIABLE)
    if api_key == "":
        raise ConfigError(f"the key of --api-key or {API_KEY_VARIABLE} is empty; give one, or neither for no lock")
    # Before the model: it may take minutes to load.
    with bind(args.host, args.port) as listener:
        model, tokenizer = load_for_decoding(args)
        if limits.max_kv_bytes is None:
            limits = replace(limits, max_kv_bytes=key_value_budget(model))
        name = args.served_model_name or Path(args.model).resolve().name
        service = Service(model, tokenizer, name=name, limits=limits, segment_length=args.segment_length)
        server = Server(build_app(service, api_key=api_key), service, grace_seconds=args.grace_period)
        log_end_tokens(tokenizer, model.config.vocab_size)
        line = f"{name} at {address_of(listener)}: {_describe(model, limits)}\n"

        def announce() -> None:
            sys.stdout.write(line)
            sys.stdout.flush()

        server.run(listener, signals=(signal.SIGTERM, signal.SIGINT), on_ready=announce)
    return 0


def _describe(model: RecurrentLM, limits: Limits) -> str:
    """Return what a full batch needs, measured with a token: kernels are compiled before the first request comes."""
    from statex_dist.inference.memory import measure_row

    row, slots = measure_row(model), limits.max_batch_size
    states = f"{slots} slots, {size(row.state)} of state each, {size(row.state * slots)} in all"
    if not row.per_token:
        return f"{states} (twice that as rows join or leave)"
    most = "any number"
    if limits.max_kv_bytes is not None:
        most = f"{size(limits.max_kv_bytes)} or {limits.max_kv_bytes // row.per_token} tokens"
    return f"{states}, {size(row.per_token)} of keys and values a token, {most} in all (twice as rows join or leave)"
