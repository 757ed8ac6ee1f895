"""Work on many tensors at a time: each thread with tools of its own, the first failure stops all."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Protocol, TypeVar

from statex_dist.checkpoint.formats.tensor_io import Progress


class Closable(Protocol):
    """What holds open files."""

    def close(self) -> None:
        """Close them."""


ToolT = TypeVar("ToolT", bound=Closable)
ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


def in_threads(
    items: Iterable[ItemT],
    make_tool: Callable[[], ToolT],
    work: Callable[[ItemT, ToolT], ResultT],
    *,
    workers: int,
    stop: Callable[[], None] = lambda: None,
) -> list[ResultT]:
    """Return ``work(item, tool)`` of every item, in order.

    Args:
        items: What to work on; begun in this order.
        make_tool: Makes what a thread needs (buffers, open files); closed at the end.
        work: The work.
        workers: Threads.
        stop: Called at the end, also of a failure, before the threads are waited for: makes running work give up.

    Raises:
        Exception: The first that ``work`` raised.
    """
    local = threading.local()
    tools: list[ToolT] = []

    def run(item: ItemT) -> ResultT:
        if not hasattr(local, "tool"):
            local.tool = make_tool()
            tools.append(local.tool)
        return work(item, local.tool)

    with ThreadPoolExecutor(max_workers=workers, thread_name_prefix="tensor") as pool:
        futures = [pool.submit(run, item) for item in items]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        finally:
            stop()
            pool.shutdown(wait=True, cancel_futures=True)
            for tool in tools:
                tool.close()
    return [future.result() for future in futures]


class Counter:
    """Bytes done so far, by all threads; tells the caller of them.

    Args:
        total: Bytes in all.
        progress: Whom to tell.
        done: Bytes that were done before.
    """

    def __init__(self, total: int, progress: Progress | None, *, done: int = 0):
        self._total, self._progress, self._done = total, progress, done
        self._lock = threading.Lock()
        self._stopped = False

    def stop(self) -> None:
        """Make every thread give up at its next block."""
        self._stopped = True

    def advance(self, count: int) -> None:
        """Count bytes.

        Raises:
            StoppedError: Another thread has failed.
        """
        if self._stopped:
            raise StoppedError
        with self._lock:
            self._done += count
            if self._progress:
                self._progress(self._done, self._total)


class StoppedError(Exception):
    """Ends a thread because another one has failed."""
