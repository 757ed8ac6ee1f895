"""Ranks of which some fail: all end, and every text is reported by one of them."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable

import pytest

from statex_dist.distributed.error_sync import OtherRankError, fail_together
from statex_dist.errors import ConfigError, DataError, StateXError


def on_ranks(*failures: Exception | None) -> list[Exception | None]:
    """Run one thread for each rank, which fails so; return what each raises."""
    size = len(failures)
    values, barrier, raised = [None] * size, threading.Barrier(size), list[Exception | None]([None] * size)

    def gather_of(rank: int) -> Callable[[object], list[object]]:
        def gather(value: object) -> list[object]:
            values[rank] = value
            barrier.wait(20)
            return list(values)

        return gather

    def run(rank: int) -> None:
        try:
            with fail_together(rank, gather_of(rank), place="runs/x"):
                if (failure := failures[rank]) is not None:
                    raise failure
        except Exception as error:
            raised[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return raised


def reported(errors: list[Exception | None]) -> list[tuple[int, str]]:
    return [(r, str(e)) for r, e in enumerate(errors) if isinstance(e, StateXError) and not e.agreed]


def test_where_nobody_fails_all_continue():
    assert on_ranks(None, None, None) == [None, None, None]


def test_what_all_say_is_reported_by_rank_0():
    errors = on_ranks(*(ConfigError("no such data") for _ in range(4)))
    assert [type(error) for error in errors] == [ConfigError] * 4
    assert reported(errors) == [(0, "no such data")]


def test_what_is_wrong_on_some_hosts_is_reported_once_for_each_text_and_by_rank_0():
    errors = on_ranks(None, DataError("a"), DataError("a"), ConfigError("b"), None)
    assert reported(errors) == [(0, "rank 1 failed: a"), (1, "a"), (3, "b")]
    assert [type(error) for error in errors] == [OtherRankError, DataError, DataError, ConfigError, OtherRankError]
    assert [error.exit_code for error in errors if isinstance(error, StateXError)] == [2] * 5


def test_an_error_of_the_system_has_its_path_and_one_of_the_program_its_traceback():
    full, wrong = OSError(errno.ENOSPC, "No space left on device", "cache/x"), ZeroDivisionError("no")
    errors = on_ranks(full, wrong)
    assert reported(errors) == [
        (0, "cache/x: No space left on device; free space there, or choose another place"),
    ]
    assert errors[1] is wrong


@pytest.mark.parametrize("rank", [0, 1, 7])
def test_an_agreed_error_is_reported_by_rank_0(rank: int):
    assert ConfigError("x").on_all_ranks(rank).agreed == (rank > 0)
