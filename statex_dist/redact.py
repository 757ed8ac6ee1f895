"""Remove secrets from everything that is shown or written; no other module decides what a secret is.

Three rules are applied to every text, in this order:

1. **Remembered secrets**: parts of the URLs that this process was given (:func:`remember`) and keys in its environment
   are replaced wherever they occur, percent-encoded or not. Libraries print parts of a URL, not only whole ones.
2. **URLs**: user info, query and fragment of any scheme.
3. **Headers and parameters** that carry credentials by their name.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import os
import re
import sys
import threading
import traceback
from collections.abc import Mapping
from typing import Any, cast
from urllib.parse import quote, quote_plus, unquote, unquote_plus

MARK = "***"
"""Replaces a secret in a text."""

_SHORTEST = 4
"""Length of the shortest secret that is replaced outside of its URL: shorter ones are parts of common words."""

_URL = re.compile(
    # A Path folds the slashes of a URL; with one slash only known schemes count, since "name:/path" is no URL.
    r"(?<![a-z0-9+.-])(?!file:|local:)((?:[a-z][a-z0-9+.-]*://|(?:https?|s3|gs|azure|azure-dl|oci|hf|sftp|dbfs|alipan):/)/?)"
    r"([^\s\"'<>`\\\x00-\x1f]+)",
    re.IGNORECASE,
)
_TRAILING = re.compile(r"[),.;:\]}]*$")
_PARAMETER = re.compile(
    r"([?&](?:x-(?:amz|goog|ms)-[\w-]+|awsaccesskeyid|googleaccessid|sig|signature|[\w-]*(?:token|secret|password)|"
    r"api_?key|auth|credential|key-pair-id|policy)=)([^&\s\"'<>)]+)",
    re.IGNORECASE,
)
_HEADER = re.compile(r"(authorization[\"']?\s*[:=]\s*b?[\"']?(?:basic|bearer|token)\s+)([^\s\"',]+)", re.IGNORECASE)
_ENCODED = re.compile(r"%[0-9A-F]{2}")
_SECRET_NAME = re.compile(r"sig|token|secret|passw|key|cred|auth|policy|amz|goog", re.IGNORECASE)
_VARIABLE = re.compile(r"(?:^|_)(?:TOKEN|SECRET|PASSWORD|PASSPHRASE|API_KEY|ACCESS_KEY|ACCOUNT_KEY|SECRET_KEY)$")

_secrets: dict[str, None] = {}
_pattern: re.Pattern[str] | None = None
_lock = threading.Lock()


def redact(text: str) -> str:
    """Return a text without the secrets in it."""
    if (pattern := _pattern) is not None:
        text = pattern.sub(MARK, text)
    if ":/" in text:
        text = _URL.sub(_without_secrets, text)
    if "=" in text:
        text = _PARAMETER.sub(rf"\g<1>{MARK}", text)
    if "uthorization" in text or "UTHORIZATION" in text:
        text = _HEADER.sub(rf"\g<1>{MARK}", text)
    return text


def redacted(value: Any) -> Any:
    """Return a nested value of dicts, lists and tuples with every text in it redacted."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {key: redacted(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(redacted(item) for item in value)
    return value


def bare_url(url: str) -> str:
    """Return a URL without user info, query and fragment, with no mark in their place: the identity of a dataset."""
    scheme, rest = _parts(url)
    authority, place, _ = _split(rest, doubtful=False)
    return scheme + authority.rpartition("@")[2] + place


def holds_secret(text: str) -> bool:
    """Return whether a text has a URL with user info, a query or a fragment."""
    return any(_without_secrets(found) != found[0] for found in _URL.finditer(text))


def holds_remembered(text: str) -> bool:
    """Return whether a text has a secret that this process was given."""
    return _pattern is not None and _pattern.search(text) is not None


def remember(url: str) -> None:
    """Replace the secret parts of a URL in all later texts, in every encoding that libraries print."""
    authority, _, behind = _split(_parts(url)[1])
    user, has_user, _ = authority.rpartition("@")
    query, _, fragment = behind.removeprefix("?").partition("#")
    if has_user:
        name, _, password = user.partition(":")
        _remember(user, password)
        _remember(base64.b64encode(f"{unquote(name)}:{unquote(password)}".encode()).decode())
        if not password and len(name) >= 2 * _SHORTEST:
            _remember(name)  # a token in the place of the name
    _remember(query)
    for pair in query.split("&"):
        name, _, value = pair.partition("=")
        if _SECRET_NAME.search(name) or _is_random(value or name):
            _remember(pair, value)
    if _is_random(fragment):
        _remember(fragment)


def remember_all(value: Any) -> None:
    """Remember the secrets of every URL in a nested value."""
    if isinstance(value, str):
        for found in _URL.finditer(value):
            remember(found[0])
    elif isinstance(value, Mapping):
        remember_all(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            remember_all(item)


def remember_environment() -> None:
    """Replace the values of variables such as ``WANDB_API_KEY`` and ``AWS_SECRET_ACCESS_KEY`` from now on."""
    for name, value in os.environ.items():
        if _VARIABLE.search(name.upper()) and len(value) >= 2 * _SHORTEST:
            _remember(value)
        elif ":/" in value and name.lower().endswith("_proxy"):
            remember(value)


def _remember(*texts: str) -> None:
    global _pattern
    with _lock:
        before = len(_secrets)
        for text in texts:
            for plain in {text, unquote(text), unquote_plus(text)}:
                encoded = {quote(plain, safe=""), quote(plain), quote_plus(plain)}
                lower = {_ENCODED.sub(lambda found: found[0].lower(), form) for form in encoded}
                for form in {plain, repr(plain)[1:-1], json.dumps(plain)[1:-1]} | encoded | lower:
                    if len(form) >= _SHORTEST:
                        _secrets[form] = None
        if len(_secrets) > before:
            # The longest first: a part of a secret must not leave the rest of it.
            longest = sorted(_secrets, key=len, reverse=True)
            _pattern = re.compile("|".join(re.escape(secret) for secret in longest))


def _is_random(value: str) -> bool:
    return len(value) >= 2 * _SHORTEST and any(c.isdigit() for c in value) and any(c.isalpha() for c in value)


def _parts(url: str) -> tuple[str, str]:
    scheme, colon, rest = url.partition(":")
    bare = rest.lstrip("/")
    return scheme + colon + rest[: len(rest) - len(bare)], bare


def _split(rest: str, *, doubtful: bool = True) -> tuple[str, str, str]:
    """Split what follows ``scheme://`` into authority, path and the rest from ``?`` or ``#`` on.

    An unencoded ``/``, ``?`` or ``#`` in a password ends the authority too early. It is recognised by the text after
    the colon, which is not a port; if it could be one (``host:80/a@b``), ``doubtful`` treats it as a password.
    """
    end = re.search(r"[/?#]", rest)
    authority = rest[: end.start()] if end else rest
    name, colon, port = authority.rpartition(":")
    if "@" not in authority and colon and "@" in rest and (doubtful or not port.isdecimal()) and not name.endswith("]"):
        at = rest.rindex("@")
        end = re.compile(r"[/?#]").search(rest, at)
        authority = rest[: end.start()] if end else rest
    behind = rest[len(authority) :]
    cut = re.search(r"[?#]", behind)
    return authority, (behind[: cut.start()] if cut else behind), (behind[cut.start() :] if cut else "")


def _without_secrets(found: re.Match[str]) -> str:
    tail = cast(re.Match[str], _TRAILING.search(found[2]))[0]
    rest = found[2][: len(found[2]) - len(tail)]
    authority, place, behind = _split(rest)
    user, at, host = authority.rpartition("@")
    shown = (MARK if user else "") + at + host + place
    if behind:
        shown += behind[0] + MARK
    return found[1] + shown + tail


class _CleanRecord(logging.LogRecord):
    """A record of any logger of this process, third-party ones too, without secrets."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        with contextlib.suppress(TypeError, ValueError):  # arguments that do not fit: logging reports them itself
            text = super().getMessage()
            if (clean := redact(text)) != text:
                self.msg, self.args = clean, ()
        if self.exc_info and self.exc_info[0] is not None:
            text = "".join(traceback.format_exception(*self.exc_info)).rstrip("\n")
            if (clean := redact(text)) != text:
                self.exc_text, self.exc_info = clean, None


def keep_secrets() -> None:
    """Redact the log records of every logger and the tracebacks of this process from now on."""
    remember_environment()
    if logging.getLogRecordFactory() is not _CleanRecord:
        logging.setLogRecordFactory(_CleanRecord)
    sys.excepthook = _print_exception
    threading.excepthook = _print_thread_exception


def _print_exception(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))


def _print_thread_exception(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None and not isinstance(args.exc_value, SystemExit):
        name = args.thread.name if args.thread is not None else "?"
        text = "".join(traceback.format_exception(args.exc_type, args.exc_value, args.exc_traceback))
        sys.stderr.write(redact(f"Exception in thread {name}:\n{text}"))
