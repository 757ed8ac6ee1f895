"""Pre-emption: a scheduler's SIGTERM becomes a request to save and stop at the next step."""

from __future__ import annotations

import logging
import signal
from types import FrameType

logger = logging.getLogger(__name__)

EXIT_PREEMPTED = 75
"""Exit code of a run that was told to stop, saved and can be resumed (sysexits' EX_TEMPFAIL)."""


class StopRequest:
    """Remembers that this process was told to stop.

    A second signal is handed to the default handler, so that an impatient user is not kept waiting.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.received = False

    def install(self) -> None:
        """Start to listen."""
        for number in self.SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        logger.warning("%s received: saving after this step", signal.Signals(number).name)
        for each in self.SIGNALS:
            signal.signal(each, signal.SIG_DFL)
