"""Hold DeepSpeed's settings to DeepSpeed itself before anything is read: what it refuses becomes one line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import ValidationError

from statex_dist.engine.deepspeed_keys import ZERO
from statex_dist.errors import ConfigError, reason

_QUANTIZED = ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")


def check_settings(
    settings: dict[str, Any], passed: Mapping[str, Any], *, world_size: int, device: torch.device
) -> None:
    """Raise unless DeepSpeed takes the keys of ``engine.deepspeed``, on this device and number of ranks.

    Args:
        settings: DeepSpeed's configuration, with these keys in it.
        passed: The keys.
        world_size: Number of ranks.
        device: Where the model is trained.

    Raises:
        ConfigError: It does not; every rank comes to the same answer, before the ranks join.
    """
    try:
        zero: DeepSpeedZeroConfig = DeepSpeedConfig(settings).zero_config
    except ValidationError as error:
        first = error.errors()[0]
        where = _place(passed, [str(part) for part in first["loc"]])
        raise ConfigError(f"{where}: DeepSpeed refuses it: {first['msg']}") from None
    except (ValueError, TypeError, AssertionError, AttributeError) as error:
        raise ConfigError(f"engine.deepspeed: DeepSpeed refuses it: {reason(error)}") from None
    _check_ranks(zero, world_size)
    if device.type == "cpu":
        for name in _QUANTIZED:
            if getattr(zero, name):
                raise ConfigError(f"engine.deepspeed.{ZERO}.{name} needs a GPU: DeepSpeed has no such operator on CPU")


def _place(passed: Mapping[str, Any], inside: Sequence[str]) -> str:
    """Return the full name of a key that DeepSpeed names without the section that it lies in."""
    sections = (name for name, value in passed.items() if isinstance(value, Mapping) and set(inside[:1]) & set(value))
    return ".".join(["engine.deepspeed", *([section] if (section := next(sections, None)) else []), *inside])


def _check_ranks(zero: Any, world_size: int) -> None:
    size = zero.zero_hpz_partition_size
    if size < 1 or world_size % size:
        raise ConfigError(
            f"engine.deepspeed.{ZERO}.zero_hpz_partition_size={size} does not divide {world_size} ranks; set it to "
            "the ranks of one host, or 1"
        )
