"""The tensors that a host reads of its files, by a model of transformers without data: what a checkpoint must hold.

The offline tools run without torch. They know the tensors of the recurrent layers; those of the others are known where
transformers is installed.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from statex_dist.errors import ConfigError, shown
from statex_dist.models.config import ModelConfig
from statex_dist.models.registry import config_from_dict

logger = logging.getLogger(__name__)

_MOST = 4096
"""Layers, heads, experts or blocks of a model that is built: each may take time."""

Shapes = Mapping[str, tuple[int, ...]]


def host_tensors(config: ModelConfig) -> Shapes | None:
    """Return the shapes of all tensors of a hosted model by their names in files, or None where they are not known."""
    found = _built(json.dumps(config.to_dict(), sort_keys=True))
    return None if found is None else found[0]


def memory_tensors(config: ModelConfig) -> Shapes | None:
    """Return the shapes of all parameters of a hosted model by their names in memory, or None as above."""
    found = _built(json.dumps(config.to_dict(), sort_keys=True))
    return None if found is None else found[1]


@lru_cache(maxsize=8)
def _built(text: str) -> tuple[Shapes, Shapes] | None:
    """Build a model on ``meta`` and return the shapes in files and in memory."""
    config = config_from_dict(json.loads(text))
    if getattr(config, "HOST", None) is None or config.obstacle:
        return None
    if any(importlib.util.find_spec(name) is None for name in ("torch", "transformers")):
        return None
    values: dict[str, Any] = getattr(config, "text")  # noqa: B009 (of hosted models alone)
    if many := next((key for key, value in values.items() if key.startswith("num_") and _is_many(value)), None):
        logger.warning("%s=%s: the tensors of the host's layers are not checked", many, shown(values[many]))
        return None
    import torch  # of a host alone

    from statex_dist.models.build import build_lm

    try:
        with _quiet(), torch.device("meta"):
            model: Any = build_lm(config)
            model.model.tie_weights()
    except ConfigError as error:
        logger.warning("the tensors of the host's layers are not checked: %s", error)
        return None
    parameters = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    files = {part.name: part.shape for parts in model.file_parts().values() for part in parts}
    return files, parameters


def _is_many(value: Any) -> bool:
    return isinstance(value, int) and value > _MOST


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what transformers and its kernels say of this machine when a model is built: none is run."""
    from transformers.utils import logging as their_logging

    level = their_logging.get_verbosity()
    their_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        their_logging.set_verbosity(level)
