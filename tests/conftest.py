"""One thread per process: tiny tensors gain nothing from more, and OpenMP spinning on a busy machine costs tenfold."""

import logging
import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and for the processes that tests start

import pytest
import torch

from statex_dist.ops.mamba_api import enter_mamba_ssm, has_mamba_ssm

if torch.cuda.is_available() and has_mamba_ssm():
    enter_mamba_ssm()  # transformers' Mamba2, an oracle, takes our build of the package for a compiled one


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
