"""Remove secrets from everything that is shown or written; no other module decides what a secret is.

Three rules are applied to every text, in this order:

1. **Remembered secrets**: parts of the URLs that this process was given (:func:`remember`) and keys in its environment
   are replaced wherever they occur, percent-encoded or not. Libraries print parts of a URL, not only whole ones.
2. **URLs**: user info, query and fragment of any scheme.
3. **Headers, parameters and options** that carry credentials by their name.
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
import warnings
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any, cast
from urllib.parse import quote, quote_plus, unquote, unquote_plus

MARK = "***"
"""Replaces a secret in a text."""

_SHORTEST = 4
"""Length of the shortest secret that is replaced outside of its URL: shorter ones are parts of common words."""

_BEGIN = (
    # A Path folds the slashes of a URL; with one slash only known schemes count, since "name:/path" is no URL.
    r"(?<![a-z0-9+.-])(?!file:|local:)((?:[a-z][a-z0-9+.-]*://|(?:https?|s3|gs|azure|azure-dl|oci|hf|sftp|dbfs|alipan):/)/?)"
)
_URL_BEGIN = re.compile(_BEGIN, re.IGNORECASE)
_URL = re.compile(_BEGIN + r"([^\s\"'<>`\\\x00-\x1f]+)", re.IGNORECASE)
_TRAILING = "),.;:]}"
"""Characters behind a URL that belong to the text around it."""
_PARAMETER = re.compile(
    r"([?&](?:x-(?:amz|goog|ms)-[\w-]+|awsaccesskeyid|googleaccessid|sig|signature|[\w-]*(?:token|secret|password)|"
    r"api_?key|auth|credential|key-pair-id|policy)=)([^&\s\"'<>)]+)",
    re.IGNORECASE,
)
_HEADER = re.compile(r"(authorization[\"']?\s*[:=]\s*b?[\"']?(?:basic|bearer|token)\s+)([^\s\"',]+)", re.IGNORECASE)
_ENCODED = re.compile(r"%[0-9A-F]{2}")
_SECRET_NAME = re.compile(r"sig|token|secret|passw|key|cred|auth|policy|amz|goog", re.IGNORECASE)
# Of a signed URL: "host", "3600" and "AWS4-HMAC-SHA256" stand in many texts.
_PUBLIC_NAME = re.compile(r"(?:x-(?:amz|goog)-)?(?:signedheaders|expires|algorithm|date|content-sha256)", re.IGNORECASE)
_VARIABLE = re.compile(r"(?:^|_)(?:TOKEN|SECRET|PASSWORD|PASSPHRASE|KEY)$")
_OPTION = re.compile(
    r"(?:.*_)?(?:api_?key|access_key|secret|secret_key|password|passwd|passphrase|(?:api|auth|access|bearer)_token)|token",
    re.IGNORECASE,
)
"""Names of options, of a user's callback perhaps, whose values are secrets; ``eos_token`` and the like are none."""

_secrets: dict[str, dict[int, set[str]]] = {}
"""Remembered secrets by their first :data:`_SHORTEST` characters, then by length, the greatest first.

So the cost of a text does not grow with the number of secrets.
"""
_lock = threading.Lock()


def redact(text: str) -> str:
    """Return a text without the secrets in it."""
    return _without_urls(_without_remembered(text, words=True) if _secrets else text)


def redacted(value: Any) -> Any:
    """Return settings (nested dicts and lists) with every text in them redacted.

    A remembered secret that could be an ordinary word is left: it would spoil settings with that word.
    """
    if isinstance(value, str):
        if _URL_BEGIN.match(value):  # a whole value is a URL up to its end, whatever stands in it
            value = _shown(value)
        return _without_urls(_without_remembered(value, words=False) if _secrets else value)
    if isinstance(value, Mapping):
        return {key: MARK if _is_secret(key, item) else redacted(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(item) for item in value]
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
    return next(_remembered_in(text, words=True), None) is not None


def remember(url: str) -> None:
    """Replace the secret parts of a URL in all later texts, in every encoding that libraries print."""
    authority, _, behind = _split(_parts(url)[1])
    user, has_user, _ = authority.rpartition("@")
    query, _, fragment = behind.removeprefix("?").partition("#")
    if has_user:
        name, _, password = user.partition(":")
        _remember(user, password)
        for encoding in ("utf-8", "latin-1"):  # requests writes the latter
            with contextlib.suppress(UnicodeEncodeError):
                _remember(base64.b64encode(f"{unquote(name)}:{unquote(password)}".encode(encoding)).decode())
        if not password and len(name) >= 2 * _SHORTEST:
            _remember(name)  # a token in the place of the name
    if "=" in query or _is_random(query):
        _remember(query)
    for pair in query.split("&"):
        name, _, value = pair.partition("=")
        if not _PUBLIC_NAME.fullmatch(name) and ((value and _SECRET_NAME.search(name)) or _is_random(value or name)):
            _remember(pair, value)
    if _is_random(fragment):
        _remember(fragment)


def remember_found(text: str) -> None:
    """Remember the secrets of every URL that stands in a text."""
    for found in _URL.finditer(text):
        for url in _urls(found[0].rstrip(_TRAILING)):
            remember(url)


def remember_all(value: Any) -> None:
    """Remember the secrets in a nested value: those of every URL, and options with the name of a secret."""
    if isinstance(value, str):
        remember_found(value)
        for whole in (value, value.partition("=")[2]):  # or an argument
            if _URL_BEGIN.match(whole):
                remember(whole)  # with blanks or quotes in its password
    elif isinstance(value, Mapping):
        remember_all([*value, *value.values()])
        _remember(*(item for key, item in value.items() if _is_secret(key, item)))
    elif isinstance(value, list | tuple):
        for item in value:
            remember_all(item)


def _is_secret(key: Any, value: Any) -> bool:
    return isinstance(key, str) and isinstance(value, str) and bool(value and _OPTION.fullmatch(key))


def remember_environment() -> None:
    """Replace the values of variables such as ``WANDB_API_KEY`` and ``AWS_SECRET_ACCESS_KEY`` from now on."""
    for name, value in os.environ.items():
        named = _VARIABLE.search(name.upper()) and len(value) >= 2 * _SHORTEST
        if named and not os.path.exists(value):  # noqa: PTH110 - Path raises for a value that can be no path
            _remember(value)
        elif ":/" in value and name.lower().endswith("_proxy"):
            remember(value)


def _remember(*texts: str) -> None:
    forms: set[str] = set()
    for text in texts:
        for plain in {text, unquote(text), unquote_plus(text)}:
            encoded = {quote(plain, safe=""), quote(plain), quote_plus(plain)}
            lower = {_ENCODED.sub(lambda found: found[0].lower(), form) for form in encoded}
            forms |= {plain, repr(plain)[1:-1], ascii(plain)[1:-1], json.dumps(plain)[1:-1]} | encoded | lower
    with _lock:
        for form in forms:
            if (size := len(form)) < _SHORTEST:
                continue
            known = _secrets.get(begin := form[:_SHORTEST], {})
            if size in known:
                known[size].add(form)
            else:  # a new dictionary: other threads may be reading the old one
                # The longest first: a part of a secret must not leave the rest of it.
                _secrets[begin] = dict(sorted({**known, size: {form}}.items(), reverse=True))


def _remembered_in(text: str, *, words: bool) -> Iterator[tuple[int, int]]:
    """Yield begin and end of each remembered secret in a text; of those that look like words only if ``words``."""
    end = 0
    for begin in range(len(text) - _SHORTEST + 1):
        if (known := _secrets.get(text[begin : begin + _SHORTEST])) is None or begin < end:
            continue
        for size, secrets in known.items():
            secret = text[begin : begin + size]
            if secret in secrets and (not _is_word(secret) or (words and _stands_alone(text, begin, begin + size))):
                end = begin + size
                yield begin, end
                break


def _without_remembered(text: str, *, words: bool) -> str:
    parts, done = [], 0
    for begin, end in _remembered_in(text, words=words):
        parts += [text[done:begin], MARK]
        done = end
    return "".join([*parts, text[done:]]) if parts else text


def _is_word(secret: str) -> bool:
    """Return whether a secret could be an ordinary word or number."""
    return len(secret) < 2 * _SHORTEST or secret.isalpha() or secret.isdecimal()


def _stands_alone(text: str, begin: int, end: int) -> bool:
    """Return whether a part of a text is not a part of a longer word."""

    def joins(place: int) -> bool:
        return 0 <= place < len(text) and (text[place].isalnum() or text[place] == "_")

    before = joins(begin) and joins(begin - 1) and text[max(begin - 3, 0) : begin - 2] != "%"
    return not before and not (joins(end - 1) and joins(end))


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


def _without_urls(text: str) -> str:
    if ":/" in text:
        text = _URL.sub(_without_secrets, text)
    if "=" in text:
        text = _PARAMETER.sub(rf"\g<1>{MARK}", text)
    if "uthorization" in text or "UTHORIZATION" in text:
        text = _HEADER.sub(rf"\g<1>{MARK}", text)
    return text


def _without_secrets(found: re.Match[str]) -> str:
    url = found[0].rstrip(_TRAILING)
    return _shown(url) + found[0][len(url) :] if len(url) > len(found[1]) else found[0]


def _urls(text: str) -> list[str]:
    """Return the URLs that stand in a text without blanks, with what separates them; one in a query is part of it."""
    begins = [found.start() for found in _URL_BEGIN.finditer(text)]
    query = re.search(r"[?#]", text)
    cuts = [begin for begin in begins if query is None or begin < query.start()]
    return [text[begin:end] for begin, end in pairwise([*cuts, len(text)])]


def _shown(text: str) -> str:
    """Return a text that begins with a URL, with a mark in the place of its secrets."""
    parts = []
    for url in _urls(text):
        begin = cast(re.Match[str], _URL_BEGIN.match(url))[0]
        authority, place, behind = _split(url[len(begin) :])
        user, at, host = authority.rpartition("@")
        parts += [begin, MARK if user else "", at, host, place, behind[:1], MARK if behind else ""]
    return "".join(parts)


class _CleanRecord(logging.LogRecord):
    """A record of any logger of this process, third-party ones too, without secrets."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # What cannot be shown, such as arguments that do not fit, logging reports itself, and not to its caller.
        with contextlib.suppress(Exception):
            text = super().getMessage()
            if (clean := redact(text)) != text:
                self.msg, self.args = clean, ()
        with contextlib.suppress(Exception):
            if self.exc_info and self.exc_info[0] is not None:
                text = "".join(traceback.format_exception(*self.exc_info)).rstrip("\n")
                if (clean := redact(text)) != text:
                    self.exc_text, self.exc_info = clean, None
            if self.stack_info:
                self.stack_info = redact(self.stack_info)


def keep_secrets() -> None:
    """Redact the log records of every logger, the warnings and the tracebacks of this process from now on."""
    remember_environment()
    if logging.getLogRecordFactory() is not _CleanRecord:
        logging.setLogRecordFactory(_CleanRecord)
    sys.excepthook = _print_exception
    sys.unraisablehook = _print_unraisable
    threading.excepthook = _print_thread_exception
    warnings.formatwarning = _clean_warning


_formatwarning = warnings.formatwarning


def _clean_warning(*args: Any, **kwargs: Any) -> str:
    return redact(_formatwarning(*args, **kwargs))


def _print_exception(kind: type[BaseException], error: BaseException | None, trace: Any, before: str = "") -> None:
    if sys.stderr is not None:
        sys.stderr.write(redact(before + "".join(traceback.format_exception(kind, error, trace))))


def _print_thread_exception(args: threading.ExceptHookArgs) -> None:
    if not isinstance(args.exc_value, SystemExit):
        name = args.thread.name if args.thread is not None else "?"
        _print_exception(args.exc_type, args.exc_value, args.exc_traceback, f"Exception in thread {name}:\n")


def _print_unraisable(args: sys.UnraisableHookArgs) -> None:
    shown = type(args.object).__name__
    with contextlib.suppress(Exception):
        shown = repr(args.object)
    before = f"{args.err_msg or 'Exception ignored in'}: {shown}\n"
    _print_exception(args.exc_type, args.exc_value, args.exc_traceback, before)
