"""Ranks that do a step of their work together: where one fails, all do, and say why, each text once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from statex_dist.errors import StateXError, failure_text


class OtherRankError(StateXError):
    """Another rank failed and says why; this one only has to stop.

    Args:
        message: Which one.
        exit_code: That rank's, so that the launcher reports the same whichever ends first.
    """

    def __init__(self, message: str, exit_code: int = 1):
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]


@contextmanager
def all_or_none(rank: int, gather: Callable[[int], list[int]], *, work: str) -> Iterator[None]:
    """Wait at the end for all ranks; where one failed inside, all fail.

    Args:
        rank: Number of this process.
        gather: Returns every rank's value, by rank; ends when all have called it.
        work: What they do, for the message.

    Raises:
        OtherRankError: Another rank failed, and this one did not or comes after it.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    codes = gather(0 if failure is None else getattr(failure, "exit_code", 1))
    first = next((other for other, code in enumerate(codes) if code), rank)
    if first != rank:
        raise OtherRankError(f"rank {first} of {work} failed", codes[first])
    if failure is not None:
        raise failure


@contextmanager
def fail_together(rank: int, gather: Callable[[Any], list[Any]], *, place: str) -> Iterator[None]:
    """Wait at the end for all ranks; where some failed inside, all fail, and each text is reported once.

    A fault may exist on one host only: ranks with different errors raise their own.

    Args:
        rank: Number of this process.
        gather: Returns every rank's value, by rank.
        place: Where the job writes, for errors of the system that do not name it.

    Raises:
        OtherRankError: Other ranks failed, and this one did not.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    mine = None if failure is None else (failure_text(failure, place), getattr(failure, "exit_code", 1))
    reports = gather(mine)
    first = next((other for other, report in enumerate(reports) if report), None)
    if first is None:
        return
    if failure is None:
        text, code = reports[first]
        raise OtherRankError(f"rank {first} failed: {text}", code).on_all_ranks(rank)
    if isinstance(failure, OSError) and failure.errno is not None:
        failure = StateXError(failure_text(failure, place))
    if isinstance(failure, StateXError):
        failure.agreed = reports.index(mine) < rank
    raise failure
