"""Work ahead of its consumer: an iterator in a thread, and the reading of packs in worker processes.

Workers are handed what to read and answer in order, so how many there are changes nothing.
"""

from __future__ import annotations

import logging
import multiprocessing
import queue
import signal
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch.utils.data import DataLoader, Dataset

from statex_dist.data.collate import PackParts, PackReader, PieceSpec
from statex_dist.errors import DataError, StateXError

log = logging.getLogger(__name__)

T = TypeVar("T")

Order = list[tuple[str, list[PieceSpec]]]
"""The data that a worker reads at once: the source and the pieces of some packs."""

_END = object()
_POLL_SECONDS = 0.1
_PATIENCE_SECONDS = 5.0
_ORDERS_AHEAD_OF_WORKER = 2
_GRACE_SECONDS = 30


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
        # In a maker that another thread waits for, this wait must be shorter than that of the other thread.
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


def read_in_workers(
    reader: PackReader, orders: Iterator[Order], num_workers: int
) -> Generator[list[PackParts], None, None]:
    """Yield what worker processes read for each of ``orders``, in order.

    Raises:
        StateXError: What reading raised, or a worker ended by itself.
    """
    others = set(multiprocessing.active_children())
    with _sigchld_as_it_is():
        answers = iter(
            DataLoader(
                _ReadingDataset(reader),
                sampler=_Once(orders),
                batch_size=None,
                collate_fn=_unchanged,
                num_workers=num_workers,
                prefetch_factor=_ORDERS_AHEAD_OF_WORKER,
                multiprocessing_context="fork",
                worker_init_fn=_outlive_a_preemption,
            )
        )
    workers = set(multiprocessing.active_children()) - others
    try:
        while (answer := _next_answer(answers)) is not None:
            yield answer
    finally:
        # They only read. One that was killed may have left a queue locked, so the rest cannot be asked to end.
        for worker in workers:
            worker.kill()
        # One may have been looking at the event that tells them to end, and holds its lock forever; the iterator
        # sets it all the same, and would wait.
        answers._workers_done_event = multiprocessing.get_context("fork").Event()  # type: ignore[attr-defined]
        del answers


class _ReadingDataset(Dataset[list[PackParts] | StateXError]):
    """Reads packs in a worker process; a user's error is returned as it is, not wrapped into a traceback."""

    def __init__(self, reader: PackReader):
        self._reader = reader

    def __getitem__(self, order: Any) -> list[PackParts] | StateXError:
        try:
            return [self._reader.read(source, pieces) for source, pieces in order]
        except StateXError as error:
            return error


class _Once:
    """A sampler over a running iterator."""

    def __init__(self, items: Iterator[Order]):
        self._items = items

    def __iter__(self) -> Iterator[Order]:
        return self._items


@contextmanager
def _sigchld_as_it_is() -> Iterator[None]:
    """Take back the handler that torch installs: it raises wherever the main thread is when a worker dies.

    The DataLoader looks for dead workers by itself whenever an answer is late.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler)


def _outlive_a_preemption(_worker: int) -> None:
    # A pre-emption reaches every process of the job. The trainer still needs batches to end its step and save.
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE_SECONDS))
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _unchanged(item: Any) -> Any:
    return item


def _next_answer(answers: Iterator[Any]) -> list[PackParts] | None:
    """The next answer of the workers, in order; ``None`` at the end."""
    try:
        answer = next(answers, None)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataError(
            f"a data worker ended by itself ({str(error).splitlines()[0]}); give it more memory, or set fewer workers"
        ) from error
    if isinstance(answer, StateXError):
        raise answer
    return answer
