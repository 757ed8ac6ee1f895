"""Work that one rank does for all, or one rank of each disk, while the others wait without a collective giving up."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from statex_dist.distributed.disks import Disks
from statex_dist.engine.base import TrainEngine
from statex_dist.errors import StateXError, failure_text, reason

_ANSWER_SECONDS = 2.0

Answer = tuple[Any, str | None]
"""The result of an action, and why it failed."""


class Leaders:
    """The ranks that act for others; all ranks call every method together.

    Args:
        engine: The ranks.
        disks: Which ranks share a disk.
        place: Directory that the work is done in, for messages.
    """

    def __init__(self, engine: TrainEngine, disks: Disks, place: Path):
        self.engine, self.disks, self.place = engine, disks, place

    def first(self, action: Callable[[], Any]) -> Answer:
        """Return what ``action`` returned on rank 0, and why it failed there."""
        return self._while(action, self.engine.broadcast, acts=self.engine.rank == 0)

    def each(self, action: Callable[[], Any]) -> str | None:
        """Have the first rank of every disk do something; return why it failed on one of them, or None."""
        if self.disks.is_one:
            return self.first(action)[1]

        def ask(own: Answer | None) -> Answer | None:
            texts = self.engine.gather(None if own is None else own[1] or "")
            ended = [texts[leader] for leader in self.disks.leaders]
            return None if None in ended else (None, next((text for text in ended if text), None))

        return self._while(action, ask, acts=self.disks.leads)[1]

    def _while(self, action: Callable[[], Any], ask: Callable[[Answer | None], Answer | None], *, acts: bool) -> Answer:
        """Run ``action`` where this rank ``acts``, and ``ask`` the ranks together until there is an answer.

        It may take long (files of other hosts are waited for), so the others hear now and then that it is still at it:
        no collective waits for longer than a few seconds.
        """
        answers: list[Answer] = []
        ended: list[BaseException] = []

        def act() -> None:
            try:
                answers.append((action(), None))
            except (StateXError, OSError) as error:
                answers.append((None, failure_text(error, self.place)))
            except Exception as error:  # a damaged file may raise any error, and the other ranks wait for an answer
                answers.append((None, f"{self.place}: {reason(error)}"))
            except BaseException as error:
                ended.append(error)

        worker = threading.Thread(target=act, name="leader", daemon=True) if acts else None
        if worker is not None:
            worker.start()
        while True:
            if worker is not None:
                worker.join(_ANSWER_SECONDS)
            if ended:
                raise ended[0]
            answer = ask(answers[0] if answers else None)
            if answer is not None:
                return answer
