"""Mamba2 models with the keys and names of transformers."""

from __future__ import annotations

from .configuration import PlannedConfig
from .mamba2_block import Block
from .trunk import Trunk


class StateXConfig(PlannedConfig):
    """Configuration of a Mamba2 model."""

    model_type = "mamba2"
    __init__ = PlannedConfig.__init__  # transformers 5 makes one of its own for a class without

    @property
    def rms_eps(self) -> float:
        """Epsilon of the norms."""
        return self.layer_norm_epsilon

    @property
    def before_plan_state_size(self) -> int:
        """State rows of a head before the plan."""
        return self.before_plan("state_size")


class StateXModel(Trunk):
    """Mamba2 without its head."""

    config_class = StateXConfig
    base_model_prefix = "backbone"
    final_norm_name = "norm_f"
    block = Block
