"""Hold DeepSpeed's settings to DeepSpeed itself before anything is read: what it refuses becomes one line."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import ValidationError

from statex_dist.engine.config import EngineConfig
from statex_dist.engine.deepspeed_settings import ZERO, deepspeed_config
from statex_dist.errors import ConfigError, reason

_QUANTIZED = ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")


def check_settings(config: EngineConfig, *, world_size: int, device: torch.device) -> None:
    """Raise unless DeepSpeed takes the settings of ``engine.deepspeed``, on this device and number of ranks.

    Raises:
        ConfigError: It does not; every rank comes to the same answer, before the ranks join.
    """
    if not config.deepspeed:
        return
    try:
        settings = DeepSpeedConfig(deepspeed_config(config, gradient_clipping=0.0, accumulation_steps=1))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"engine.deepspeed: DeepSpeed refuses '{where}': {first['msg']}") from None
    except (ValueError, TypeError, AssertionError, AttributeError) as error:
        raise ConfigError(f"engine.deepspeed: DeepSpeed refuses it: {reason(error)}") from None
    zero: DeepSpeedZeroConfig = settings.zero_config
    _check_ranks(zero, world_size)
    if device.type == "cpu":
        for name in _QUANTIZED:
            if getattr(zero, name):
                raise ConfigError(f"engine.deepspeed.{ZERO}.{name} needs a GPU: DeepSpeed has no such operator on CPU")


def _check_ranks(zero: Any, world_size: int) -> None:
    size = zero.zero_hpz_partition_size
    if size < 1 or world_size % size:
        raise ConfigError(
            f"engine.deepspeed.{ZERO}.zero_hpz_partition_size={size} does not divide {world_size} ranks; set it to "
            "the ranks of one host, or 1"
        )
