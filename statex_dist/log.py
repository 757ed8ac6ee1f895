"""One logger tree for the package, filtered by rank.

Library modules call ``logging.getLogger(__name__)``; entry points call :func:`setup_logging` once.
"""

import logging
import os
from collections.abc import Sequence

from rich.console import Console
from rich.logging import RichHandler

from statex_dist.rank_log import DATE_FORMAT, FORMAT, LOGGERS, FoldFilter
from statex_dist.redact import holds_secret, keep_secrets


class RankFilter(logging.Filter):
    """Let only rank 0 speak below WARNING, and prefix what other ranks say with their rank."""

    def __init__(self, rank: int):
        super().__init__()
        self.rank = rank

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether ``record`` is shown on this rank."""
        if self.rank == 0:
            return True
        if record.levelno < logging.WARNING:
            return False
        record.msg = f"[rank {self.rank}] {record.msg}"
        return True


def setup_logging(level: int = logging.INFO) -> None:
    """Configure the loggers of this project for a process, and keep secrets out of the records of all loggers.

    On a terminal the output is coloured; elsewhere (files, schedulers) each record is one plain line on stderr.

    Args:
        level: Threshold of the project's loggers.
    """
    keep_secrets()
    console = Console(stderr=True)
    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(console=console, show_path=False)
        handler.setFormatter(logging.Formatter("%(message)s", datefmt="[%X]"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter(FORMAT, datefmt=DATE_FORMAT))
    rank = os.environ.get("RANK", "0")
    handler.addFilter(RankFilter(int(rank) if rank.isdecimal() else 0))  # a wrong one is refused where it is used
    handler.addFilter(FoldFilter())
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.handlers[:] = [handler]
        logger.propagate = False


def warn_of_arguments(arguments: Sequence[str]) -> None:
    """Warn of credentials on the command line."""
    if any(holds_secret(argument) for argument in arguments):
        logging.getLogger("statex_dist").warning(
            "the command line has a URL with credentials: ps and the launcher's own output show it; give the URL "
            "in the configuration file, which can be readable for you alone (chmod 600)"
        )
