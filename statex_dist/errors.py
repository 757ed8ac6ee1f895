"""Errors that a user can cause and fix.

Every message is one line with the given value, the allowed values and the action to take. Entry points print it without
a traceback. Any other exception that escapes is a programming error and keeps its traceback.

The length of a message is bounded for every input. :class:`StateXError` cuts its text. Code that shows a value from
another source bounds the value first (:func:`shown`, :func:`reason`), so that no large text is built only to be cut.
"""

import contextlib
import errno
import itertools
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from statex_dist.redact import redact

LINE_LENGTH = 380
"""Characters of a message; with the prefix of an entry point (``[rank 3] error: ``) a line has at most 400."""

SHOWN_LENGTH = 200
"""Characters of a foreign value in a message."""

_SHORTENED = " [...] "
_LONGEST_SECRET = 4096
"""Length up to which a secret is found at the place where a text is cut."""


def bounded_line(text: str, length: int = LINE_LENGTH) -> str:
    """Return a text as one line of at most ``length`` characters, cut in its middle, control characters escaped.

    The end of a message says what to do, so it is kept. Secrets are taken out before the text is cut.
    """
    if len(text) > 4 * length + 2 * _LONGEST_SECRET:  # no pass over a text that is cut anyway
        head, tail = redact(text[: 2 * length + _LONGEST_SECRET]), redact(text[-2 * length - _LONGEST_SECRET :])
        text = head[: 2 * length] + _SHORTENED + tail[-2 * length :]
    text = " ".join(redact(text).split())
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    if len(text) <= length:
        return text
    end = (length - len(_SHORTENED)) // 3
    return text[: length - len(_SHORTENED) - end] + _SHORTENED + text[-end:]


def one_line(error: BaseException) -> str:
    """Return an error's text as one line of bounded length."""
    return bounded_line(str(error))


class _Shown(reprlib.Repr):
    """``repr`` of a few levels and members of a value."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = SHOWN_LENGTH

    def repr1(self, x: Any, level: int) -> str:
        # reprlib goes by the type's name, and shows a subclass whole.
        known = next((kind for kind in (dict, list, tuple, set, frozenset, str) if isinstance(x, kind)), None)
        return getattr(self, f"repr_{known.__name__}")(x, level) if known else super().repr1(x, level)

    # reprlib would sort all members of these.
    def repr_dict(self, x: Any, level: int) -> str:
        return super().repr_dict(dict(itertools.islice(x.items(), self.maxdict + 1)), level)

    def repr_set(self, x: Any, level: int) -> str:
        return super().repr_set(set(itertools.islice(x, self.maxset + 1)), level)

    def repr_frozenset(self, x: Any, level: int) -> str:
        return super().repr_frozenset(frozenset(itertools.islice(x, self.maxfrozenset + 1)), level)


def shown(value: Any, length: int = SHOWN_LENGTH) -> str:
    """Return the ``repr`` of a foreign value for a message: of bounded length and cost, however large the value is."""
    try:
        return bounded_line(_Shown().repr(value), length)
    except (ValueError, RecursionError):  # an integer of more digits than Python prints; nesting without end
        return f"a value of type {type(value).__name__}"


def reason(error: BaseException, length: int = SHOWN_LENGTH) -> str:
    """Return type and text of another library's error for a message: bounded, without the document it may carry."""
    return bounded_line(f"{type(error).__name__}: {error}", length)


class StateXError(Exception):
    """Base of every error that is reported to the user as one line; by itself: a job that began and failed.

    Attributes:
        agreed: Whether another rank, of a lower number, reports the same text, so that this one need not.
    """

    exit_code: ClassVar[int] = 1
    agreed: bool = False

    def __init__(self, text: str = ""):
        super().__init__(bounded_line(text))

    def on_all_ranks(self, rank: int) -> Self:
        """Return this error, which all ranks raise with the same text: rank 0 reports it."""
        self.agreed = rank > 0
        return self


_REMEDIES: Mapping[int, str] = {
    errno.ENOSPC: "free space there, or choose another place",
    errno.EDQUOT: "the quota is used up: free space there, or choose another place",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f), or choose another file system",
    errno.EROFS: "choose a place that can be written",
    errno.EACCES: "make it accessible for this user, or choose another place",
    errno.EPERM: "make it accessible for this user, or choose another place",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "raise the system's limit of open files (fs.file-max)",
    errno.ESTALE: "the file server no longer knows it: mount the file system again",
    errno.EIO: "the device or the file server fails: look at the system's log (dmesg)",
    errno.ENOTCONN: "mount the file system again",
    errno.ENOTDIR: "choose another path",
    errno.EEXIST: "a file, or a link to nothing, has this name: choose another path",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.ELOOP: "correct the links",
}


def refusal(error: OSError) -> str:
    """Return what the system refused and what helps, without the path."""
    text = error.strerror or str(error) or type(error).__name__
    remedy = _REMEDIES.get(error.errno or 0)
    return f"{text}; {remedy}" if remedy else text


def os_error_text(error: OSError) -> str:
    """Return what the system refused, where, and what helps, as far as that is known."""
    where = error.filename
    if where is None:
        return refusal(error)
    return f"{where if isinstance(where, str) else shown(where)}: {refusal(error)}"


_OF_A_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def failure_text(error: BaseException, place: str | Path) -> str:
    """Return in one line why a job failed.

    Args:
        error: What ended it.
        place: Where the job writes; named where the system refused to write and does not say where.
    """
    if not isinstance(error, OSError) or error.errno is None:
        return one_line(error)
    if error.filename is None and error.errno in _OF_A_DISK:
        return bounded_line(f"{place} cannot be written: {refusal(error)}")
    return bounded_line(os_error_text(error))


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Say of a refusal by the system what was being written, and what helps.

    Args:
        path: What is written inside; a file that the error itself names is named in its place.

    Raises:
        StateXError: The disk is full or read-only, a quota or limit is reached, or permission is missing.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _REMEDIES:
            raise
        where = os_error_text(error) if error.filename is not None else f"{path} cannot be written: {refusal(error)}"
        raise StateXError(where) from None


class ConfigError(StateXError):
    """A configuration, plan or command-line value is wrong."""

    exit_code = 2


class DataError(StateXError):
    """Training or evaluation data is missing, unreadable or inconsistent."""

    exit_code = 2


class CheckpointError(StateXError):
    """A checkpoint is missing, incomplete, damaged or of another architecture."""

    exit_code = 2


class ShardError(DataError):
    """One shard of a dataset is missing, damaged or cannot be fetched; the others may be well."""


class CorruptShardError(ShardError):
    """The shard itself is missing or damaged at its origin; network, cache and credentials are not to blame."""
