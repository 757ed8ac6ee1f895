"""Intervals over seeds and documents, and how they are written."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version

import numpy as np
import numpy.typing as npt
import torch

RESAMPLES = 4000


def interval(values: npt.NDArray[np.float64], weights: npt.NDArray[np.float64] | None = None) -> dict[str, float]:
    """Return the mean of ``values [seeds, documents]`` with its 95 % interval.

    Seeds and documents are both drawn with replacement (bootstrap of a crossed design: Owen and Eckles 2012,
    "Bootstrapping data arrays of arbitrary order"), so that an interval covers another training as well as other
    documents. All seeds are measured on the same documents: a draw of documents is one for all of them. Three seeds
    have ten combinations, and a bootstrap over so few is too narrow: where seeds differ much, it covers about 85 %
    instead of 95 (200 simulations).

    Args:
        values: A figure of every document, for every seed; the same documents in the same order.
        weights: Of the documents, of the same shape; None for equal ones.
    """
    weights = np.ones_like(values) if weights is None else weights
    seeds, documents = values.shape
    rng = np.random.Generator(np.random.Philox(0))
    chosen = rng.integers(seeds, size=(RESAMPLES, seeds))
    rows = rng.integers(documents, size=(RESAMPLES, 1, documents))
    w = weights[chosen[:, :, None], rows]
    means = (values[chosen[:, :, None], rows] * w).sum(axis=(1, 2)) / w.sum(axis=(1, 2))
    low, high = np.quantile(means, (0.025, 0.975))
    return {"mean": float((values * weights).sum() / weights.sum()), "low": float(low), "high": float(high)}


def shown(value: dict[str, float], form: str) -> str:
    """Return an interval as people read it."""
    mean, low, high = (form.format(value[name]) for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def device() -> torch.device:
    """Return where models are measured: the GPU, if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine() -> str:
    """Return what the figures were measured on."""
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    cores = f"{platform.machine()}, {os.cpu_count()} cores"
    return f"{gpu}{cores}, torch {version('torch')}, Python {platform.python_version()}"
