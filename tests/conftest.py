"""One thread per process: tiny tensors gain nothing from more, and OpenMP spinning on a busy machine costs tenfold."""

import copy
import logging
import os
import sys
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and for the processes that tests start

import pytest

from statex_dist import redact

# Where flash-linear-attention is installed, any `import fla` registers its models with transformers' auto classes, in
# place of transformers' own Mamba2 too, and they need a GPU. In this process fla is what fla-core alone is.
sys.modules["fla.layers"] = sys.modules["fla.models"] = None  # type: ignore[assignment]


@pytest.fixture(autouse=True)
def _loggers_as_they_were() -> Iterator[None]:
    """An entry point that a test calls in this process sets up logging: what later tests capture would pass them by."""
    loggers = [logging.getLogger(name) for name in ("statex_dist", "checkpoints_tools", "launch")]
    before = [(logger.level, logger.handlers[:], logger.propagate) for logger in loggers]
    yield
    for logger, (level, handlers, propagate) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.handlers[:] = handlers
        logger.propagate = propagate


@pytest.fixture(autouse=True)
def _secrets_as_they_were() -> Iterator[None]:
    """A process remembers the secrets of its URLs; those of a test would be redacted in the messages of the next."""
    before = copy.deepcopy(redact._secrets)
    yield
    redact._secrets.clear()
    redact._secrets.update(before)
