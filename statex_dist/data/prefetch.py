"""Run an iterator one step ahead of its consumer, in a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from typing import Any, TypeVar

T = TypeVar("T")

_END = object()
_POLL_SECONDS = 0.1


class _Failure:
    def __init__(self, error: BaseException):
        self.error = error


def prefetch(items: Iterator[T], depth: int) -> Generator[T, None, None]:
    """Yield ``items``, with up to ``depth`` of them made ahead.

    An exception of ``items`` is raised here, after what was made before it. When this generator is closed or fails,
    the thread ends before control returns.

    Args:
        items: What to iterate in the thread.
        depth: Finished items that may wait; 0 iterates in the caller, without a thread.
    """
    if depth == 0:
        yield from items
        return
    ready: queue.Queue[Any] = queue.Queue(depth)
    stop = threading.Event()

    def offer(item: Any) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=_POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not offer(item):
                    return
            offer(_END)
        except BaseException as error:
            # Whatever it is, the consumer must see it: a thread that dies alone would hang the training loop.
            offer(_Failure(error))

    thread = threading.Thread(target=work, name="statex-prefetch", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not _END:
            if isinstance(item, _Failure):
                raise item.error
            yield item
    finally:
        stop.set()
        thread.join()
