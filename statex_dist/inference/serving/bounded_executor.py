"""A thread for work that would hold up the event loop, with a queue of limited length."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from statex_dist.inference.serving.worker import BusyError

T = TypeVar("T")


class Lane:
    """Does one piece of work after the other, first come, first served. It belongs to the event loop.

    Work whose caller is cancelled is not begun; where it has begun, the next waits for its end all the same.

    Args:
        name: Of the thread.
        places: Pieces of work that may wait.
    """

    def __init__(self, name: str, *, places: int):
        self._name, self._places, self._open = name, places, 0
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._turn = asyncio.Semaphore(1)

    def __len__(self) -> int:
        """Return the pieces of work that are done or wait."""
        return self._open

    async def run(self, work: Callable[[], T]) -> T:
        """Return what ``work`` returns.

        Raises:
            BusyError: No place is free.
        """
        if self._open > self._places:
            raise BusyError(f"{self._open} {self._name} are being prepared or wait for it")
        self._open += 1
        try:
            await self._turn.acquire()
        except asyncio.CancelledError:
            self._open -= 1
            raise
        done = asyncio.get_running_loop().run_in_executor(self._executor, work)
        done.add_done_callback(self._end)
        return await asyncio.shield(done)

    def _end(self, done: asyncio.Future[T]) -> None:
        self._open -= 1
        self._turn.release()
