"""Work shared out among processes of one machine, which are copies of this one.

A tool opens its source and lays out its target once; then the process is forked, so that a worker process has both
without opening a file again. What a worker finds out comes back through a pipe. Workers end with their parent, however
that ends, and with the first of them that fails.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from itertools import accumulate
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from statex_dist.checkpoint.formats.tensor_io import Progress
from statex_dist.errors import CheckpointError, StateXError
from statex_dist.work_part import WorkPart

ItemT = TypeVar("ItemT")
ShareT = TypeVar("ShareT")
ResultT = TypeVar("ResultT")

Send = Callable[[Any], None]
"""Sends a message from a worker process to its parent."""

_SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h
_SECONDS_OF_PROCESS = 10.0
_PIECE_SECONDS, _BYTE_SECONDS = 10e-6, 1e-9
_PROGRESS_SECONDS = 0.2


def default_processes(num_bytes: int, num_pieces: int) -> int:
    """Return how many processes a job is worth: one for about ten seconds of work, at most one for each core.

    Args:
        num_bytes: Bytes that are read.
        num_pieces: Stretches of files in which they lie, about.
    """
    seconds = num_bytes * _BYTE_SECONDS + num_pieces * _PIECE_SECONDS
    return max(min(len(os.sched_getaffinity(0)), int(seconds / _SECONDS_OF_PROCESS)), 1)


def cut_evenly(items: Sequence[ItemT], sizes: Sequence[int], count: int) -> list[list[ItemT]]:
    """Cut items into ``count`` consecutive shares of about equal size; some are empty where there are few items.

    Args:
        items: The items.
        sizes: Size of each.
        count: Number of shares.
    """
    shares: list[list[ItemT]] = [[] for _ in range(count)]
    total = sum(sizes) + len(sizes)
    for item, size, end in zip(items, sizes, accumulate(sizes), strict=True):
        middle = end - size / 2 + sum(map(len, shares))
        shares[min(int(middle * count / max(total, 1)), count - 1)].append(item)
    return shares


def share_of(items: Sequence[ItemT], sizes: Sequence[int], part: WorkPart) -> list[ItemT]:
    """Return the items of one part of several that do a job together; arguments of :func:`cut_evenly`."""
    return cut_evenly(items, sizes, part.count)[part.index - 1]


def in_processes(
    shares: Sequence[ShareT],
    work: Callable[[ShareT, Send], ResultT],
    *,
    receive: Callable[[Any], None] = lambda message: None,
) -> list[ResultT]:
    """Return ``work(share, send)`` of every share, each done by a process of its own.

    Args:
        shares: One for each process.
        work: Runs in a copy of this process: what it changes is not seen here.
        receive: Called here with each message of a worker, in its order.

    Raises:
        CheckpointError: A worker process was killed.
        Exception: The first that ``work`` raised.
    """
    context = multiprocessing.get_context("fork")
    workers: dict[Connection, Any] = {}
    results: dict[Connection, ResultT] = {}
    try:
        for share in shares:
            reading, writing = context.Pipe(duplex=False)
            process = context.Process(target=_run, args=(os.getpid(), work, share, writing), daemon=True)
            process.start()
            writing.close()
            workers[reading] = process
        left = set(workers)
        while left:
            for connection in wait([*left]):
                assert isinstance(connection, Connection)
                kind, value = _received(connection, workers[connection])
                if kind == "error":
                    raise value
                if kind == "result":
                    results[connection] = value
                    left.discard(connection)
                else:
                    receive(value)
    finally:
        for connection, process in workers.items():
            if connection not in results:
                process.kill()
            process.join()
            connection.close()
    return [results[connection] for connection in workers]


def _received(connection: Connection, process: Any) -> tuple[str, Any]:
    """Return the next message of a worker.

    Raises:
        CheckpointError: It ended without a result.
    """
    try:
        kind, value = connection.recv()
    except (EOFError, OSError):
        process.join()
        raise CheckpointError(
            f"a worker process ended ({_ending(process.exitcode)}): the work is not done; run the same command again"
        ) from None
    return kind, value


def _ending(code: int) -> str:
    if code == -signal.SIGKILL:
        return "killed, perhaps because the memory was used up: fewer --processes need less"
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _run(parent: int, work: Callable[[ShareT, Send], Any], share: ShareT, connection: Connection) -> None:
    """Do a share in a worker process."""
    # Ctrl-C reaches every process of the terminal; the parent ends the workers then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        return  # it was killed before this process could ask to end with it
    lock = threading.Lock()

    def send(message: Any) -> None:
        with lock:  # threads of the worker send
            connection.send(("message", message))

    try:
        connection.send(("result", work(share, send)))
    except (StateXError, OSError) as error:
        connection.send(("error", _portable(error)))
    except BaseException as error:
        error.add_note(f"in a worker process:\n{traceback.format_exc()}")
        connection.send(("error", _portable(error)))


def _portable(error: BaseException) -> BaseException:
    """Return an error that can be sent through a pipe."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError("".join(traceback.format_exception(error)))
    return error


def throttled(tell: Callable[[int], None]) -> Progress:
    """Return a callback of a worker process that tells the bytes done since the last time, a few times a second."""
    told, last = 0, 0.0

    def advance(done: int, total: int) -> None:
        nonlocal told, last
        now = time.monotonic()
        if now - last >= _PROGRESS_SECONDS or done >= total:
            count, told, last = done - told, done, now
            tell(count)

    return advance
