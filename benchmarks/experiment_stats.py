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

    Seeds are drawn with replacement, and documents within each (two-level bootstrap: Davison and Hinkley 1997, section
    3.8), so that an interval covers another training as well as other documents. Three seeds have ten combinations:
    the interval then says little more than how far apart the seeds were.

    Args:
        values: A figure of every document, for every seed.
        weights: Of the documents, of the same shape; None for equal ones.
    """
    weights = np.ones_like(values) if weights is None else weights
    seeds, documents = values.shape
    rng = np.random.Generator(np.random.Philox(0))
    chosen = rng.integers(seeds, size=(RESAMPLES, seeds))
    rows = rng.integers(documents, size=(RESAMPLES, seeds, documents))
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
