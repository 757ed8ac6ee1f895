"""Pre-emption: a scheduler's SIGTERM becomes a request to save and stop at the next step."""

from __future__ import annotations

import logging
import signal
import time
from types import FrameType

logger = logging.getLogger(__name__)

EXIT_PREEMPTED = 75
"""Exit code of a run that was told to stop, saved and can be resumed (sysexits' EX_TEMPFAIL)."""

IMPATIENCE_SECONDS = 5.0


class StopRequest:
    """Remembers that this process was told to stop.

    Launchers repeat themselves (deepspeed answers Ctrl-C by terminating ranks that have got the signal already), so
    repetitions are ignored; only an interrupt some seconds later is a user who will not wait for the save.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.received = False
        self._since = 0.0

    def install(self) -> None:
        """Start to listen."""
        for number in self.SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received, self._since = True, time.monotonic()
            logger.warning("%s received: saving after this step", signal.Signals(number).name)
        elif number == signal.SIGINT and time.monotonic() - self._since > IMPATIENCE_SECONDS:
            raise KeyboardInterrupt
