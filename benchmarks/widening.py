"""Widen the MLPs of a model without a change of its function: the control of an expansion that adds parameters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from statex_dist.errors import ConfigError
from statex_dist.models.config import ModelConfig
from statex_dist.models.fla import FLAConfig
from statex_dist.models.hf import from_pretrained, save_pretrained
from statex_dist.models.lm import RecurrentLM


def widened(config: ModelConfig, channels: int) -> FLAConfig:
    """Return the configuration with ``channels`` more in the MLP of every layer.

    Raises:
        ConfigError: The blocks of the model have no MLP, or the number is not positive.
    """
    if not isinstance(config, FLAConfig):
        raise ConfigError(f"mlp_channels needs a model with an MLP in its blocks, and {config.MODEL_TYPE} has none")
    if channels < 1:
        raise ConfigError(f"mlp_channels must be 1 or more, not {channels}")
    return replace(config, intermediate_size=config.mlp_size + channels)


def widen(source: Path, target: Path, *, channels: int, seed: int) -> None:
    """Write a model with wider MLPs that computes the same function.

    The new rows of the gate and up projections are drawn as those of a new model; the new columns of the down
    projection are zero, so that the new channels contribute nothing until they are trained.

    Args:
        source: Directory of the model.
        target: Directory of the wider one; it is replaced.
        channels: Channels to add to the MLP of every layer.
        seed: Of the new rows.

    Raises:
        ConfigError: See :func:`widened`.
    """
    narrow = from_pretrained(source)
    model = RecurrentLM(widened(narrow.config, channels)).to(next(narrow.parameters()).dtype)
    model.init_parameters(seed)
    before = dict(narrow.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("mlp.down_proj.weight"):
                parameter.zero_()
            parameter[tuple(slice(size) for size in before[name].shape)] = before[name]
    save_pretrained(model, target, overwrite=True)
