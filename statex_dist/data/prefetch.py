"""Run an iterator one step ahead of its consumer, in a thread."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Generator, Iterator
from typing import Any, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")

_END = object()
_POLL_SECONDS = 0.1
_PATIENCE_SECONDS = 5.0


class _Failure:
    def __init__(self, error: BaseException):
        self.error = error


class _Maker(threading.Thread):
    """Makes items ahead; what it waits for in turn ends with ``stop`` too."""

    def __init__(self, items: Iterator[Any], depth: int):
        super().__init__(name="statex-prefetch", daemon=True)
        self.stop = threading.Event()
        self._items = items
        self._ready: queue.Queue[Any] = queue.Queue(depth)

    def run(self) -> None:
        try:
            for item in self._items:
                if not self._offer(item):
                    return
            self._offer(_END)
        except BaseException as error:
            # Whatever it is, the consumer must see it: a thread that dies alone would hang the training loop.
            self._offer(_Failure(error))

    def take(self) -> Any:
        """Return the next item, or ``_END``: also when this is waited for in another maker, which is to stop."""
        while True:
            try:
                return self._ready.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                if _stopping():
                    return _END

    def end(self) -> None:
        """Stop making items; wait for that, but not for an item that takes long."""
        self.stop.set()
        if self is threading.current_thread():  # the garbage collector runs in any thread
            return
        # A maker that is being waited for itself does not use up all the patience that there is with it.
        self.join(_PATIENCE_SECONDS / 2 if _stopping() else _PATIENCE_SECONDS)
        if self.is_alive():
            log.debug("a prefetching thread is left behind; it ends with the item that it is making")

    def _offer(self, item: Any) -> bool:
        while not self.stop.is_set():
            try:
                self._ready.put(item, timeout=_POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False


def _stopping() -> bool:
    thread = threading.current_thread()
    return isinstance(thread, _Maker) and thread.stop.is_set()


def prefetch(items: Iterator[T], depth: int) -> Generator[T, None, None]:
    """Yield ``items``, with up to ``depth`` of them made ahead.

    An exception of ``items`` is raised here, after what was made before it. When this generator is closed or fails,
    the thread ends before control returns, unless an item takes it more than seconds: then it ends after that one.

    Args:
        items: What to iterate in the thread.
        depth: Finished items that may wait; 0 iterates in the caller, without a thread.
    """
    if depth == 0:
        yield from items
        return
    maker = _Maker(items, depth)
    maker.start()
    try:
        while (item := maker.take()) is not _END:
            if isinstance(item, _Failure):
                raise item.error
            yield item
    finally:
        maker.end()
