"""The dtype of a checkpoint's weights, and the keys of ``config.json`` that name it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from statex_dist.checkpoint.dtypes import FLOATS, TORCH_NAMES
from statex_dist.checkpoint.formats.tensor_io import TensorInfo, TensorSource, natural_dtype

DTYPE_KEYS = ("dtype", "torch_dtype")
"""Where ``config.json`` names the dtype of the weights: as transformers 5 writes it, and as 4 did."""


def with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Return a ``config.json`` that names the dtype in which the weights are stored, once.

    The key is the one that the contents have; ``dtype`` where they have both, ``torch_dtype``, which every release
    reads, where they have neither.
    """
    key = next((key for key in DTYPE_KEYS if key in config), "torch_dtype")
    return {**{k: v for k, v in config.items() if k not in DTYPE_KEYS}, key: TORCH_NAMES[dtype]}


def with_one_dtype(config: dict[str, Any], source: TensorSource) -> dict[str, Any]:
    """Return a ``config.json`` with one dtype: where its two keys differ, one is left and names the stored dtype."""
    if len({config[key] for key in DTYPE_KEYS if isinstance(config.get(key), str)}) < 2:
        return config
    stored = main_dtype([replace(source.info(name), dtype=natural_dtype(source, name)) for name in source.owned()])
    return config if stored is None else with_dtype(config, stored)


def float_dtypes(infos: Iterable[TensorInfo]) -> list[str]:
    """Return the floating-point dtypes of tensors, that of most bytes first."""
    sizes: dict[str, int] = {}
    for info in infos:
        if info.dtype in FLOATS:
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
    return sorted(sizes, key=lambda dtype: (sizes[dtype], TORCH_NAMES[dtype]), reverse=True)


def main_dtype(infos: Iterable[TensorInfo]) -> str | None:
    """Return the floating-point dtype of most bytes, or None of a checkpoint without any."""
    return next(iter(float_dtypes(infos)), None)
