"""Configuration of a Mamba2 model (the keys of transformers' ``Mamba2Config``) and its per-layer geometry.

Files of flash-linear-attention, with other keys, are read as well (:mod:`statex_dist.models.mamba2.fla_keys`).
"""

from __future__ import annotations

import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from statex_dist.errors import CheckpointError, shown
from statex_dist.models.config import ModelConfig, check_type
from statex_dist.models.mamba2 import fla_keys
from statex_dist.state.geometry import StateGeometry


@dataclass(kw_only=True)
class Mamba2Config(ModelConfig):
    """Hyper-parameters of a Mamba2 language model; names and defaults are transformers'."""

    MODEL_TYPE: ClassVar[str] = "mamba2"
    OPS: ClassVar[tuple[str, ...]] = ("grow_state",)
    FIXED: ClassVar[Mapping[str, tuple[Any, ...]]] = fla_keys.FIXED
    TRAINING: ClassVar[frozenset[str]] = fla_keys.TRAINING
    HARMLESS: ClassVar[frozenset[str]] = fla_keys.HARMLESS | {"time_step_rank"}

    num_heads: int
    head_dim: int
    state_size: int = 128
    expand: int = 2
    conv_kernel: int = 4
    n_groups: int = 8
    use_bias: bool = False
    use_conv_bias: bool = True
    hidden_act: str = "silu"
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.1
    residual_in_fp32: bool = True
    rescale_prenorm_residual: bool = False
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    time_step_limit: tuple[float, ...] = (0.0, math.inf)
    chunk_size: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("num_heads", "head_dim", "state_size", "conv_kernel", "n_groups", "chunk_size")
        self.time_step_limit = tuple(self.time_step_limit)
        if len(self.time_step_limit) != 2:
            raise CheckpointError(
                f"mamba2 config: time_step_limit={self.time_step_limit} must be two numbers, low and high"
            )
        if self.hidden_act not in ("silu", "swish"):
            raise CheckpointError(
                f"mamba2 config: hidden_act={shown(self.hidden_act)} is not supported; allowed: 'silu', also called "
                "'swish'"
            )
        if self.num_heads * self.head_dim != self.inner_size:
            raise CheckpointError(
                f"mamba2 config: num_heads={self.num_heads} x head_dim={self.head_dim} must equal "
                f"expand x hidden_size = {self.inner_size}"
            )
        if self.num_heads % self.n_groups:
            raise CheckpointError(f"mamba2 config: n_groups={self.n_groups} must divide num_heads={self.num_heads}")
        if not 0 < self.time_step_min <= self.time_step_max:
            raise CheckpointError(
                f"mamba2 config: time_step_min={self.time_step_min} and time_step_max={self.time_step_max} "
                "must be above 0 and in this order"
            )
        self.check_plan()

    @classmethod
    def in_our_names(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Return the contents of a ``config.json`` with the names of transformers, beside those of fla if there."""
        if not fla_keys.has_fla_keys(values):
            return values
        hints = typing.get_type_hints(cls)
        for key, name in fla_keys.NAMES.items():
            if key in values:
                check_type(key, values[key], hints[name])
        return fla_keys.with_transformers_keys(values)

    def with_all_names(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return the contents of fla's ``config.json`` with what transformers reads of it beside; others unchanged."""
        if not fla_keys.has_fla_keys(values):
            return values
        named = ("num_heads", "head_dim", "n_groups", *fla_keys.NAMES.values())
        return {**values, **{key: getattr(self, key) for key in named if key not in values}}

    def with_plan(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return the contents of a ``config.json`` with this plan, under the names of every library that opens it."""
        return values if self.statex is None else super().with_plan(self.with_all_names(values))

    def plain_keys(self) -> dict[str, Any]:
        """Return the grown ``state_size`` where every recurrent layer grows by the same factor."""
        factor = self.common_factor()
        return {"state_size": self.state_size * factor} if factor else {}

    @property
    def inner_size(self) -> int:
        """Channels of ``x`` and ``z``."""
        return int(self.expand * self.hidden_size)

    @property
    def final_norm_eps(self) -> float:
        """Epsilon of the RMS norms."""
        return self.layer_norm_epsilon

    def layer_geometry(self, layer: int) -> StateGeometry:
        """Return the state of ``layer`` under the plan."""
        expansion = self.statex.get(layer) if self.statex else None
        d_state = self.state_size * (expansion.factor if expansion else 1)
        return StateGeometry(
            num_heads=self.num_heads,
            key_dim=d_state,
            value_dim=self.head_dim,
            num_key_groups=self.n_groups,
            conv_channels=self.inner_size + 2 * self.n_groups * d_state,
            conv_kernel=self.conv_kernel,
            chunk_size=self.chunk_size,
        )
