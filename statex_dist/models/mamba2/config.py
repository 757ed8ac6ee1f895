"""Configuration of a Mamba2 model (the keys of transformers' ``Mamba2Config``) and its per-layer geometry.

Files of flash-linear-attention are read as well. Its ``Mamba2Config`` has the ``model_type`` of transformers', stores
the same tensors and computes the same, but under other keys and with other defaults. A file with a key that only fla
has is read by fla's names. Where both libraries' names of one value are there they must agree, so that a file that we
write for both is one.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from statex_dist.checkpoint.layout import CONFIG_NAME
from statex_dist.errors import CheckpointError, shown
from statex_dist.models.config import ModelConfig, Recurrence, check_type
from statex_dist.state.geometry import StateGeometry

_FUNCTION = {"norm_eps": ("layer_norm_epsilon", 1e-5), "dt_limit": ("time_step_limit", [0.0, math.inf])}
"""Keys that change logits: fla's name, transformers' name, fla's default."""

_INITIALISATION = {"dt_min": "time_step_min", "dt_max": "time_step_max", "dt_init_floor": "time_step_floor"}
FLA_NAMES = {key: name for key, (name, _) in _FUNCTION.items()} | _INITIALISATION
"""fla's names of our fields."""

FLA_DEFAULTS = {"head_dim": 64, "n_groups": 1, "initializer_range": 0.02, "rescale_prenorm_residual": True}
"""fla's defaults where both libraries have the key."""

FLA_FIXED: dict[str, tuple[Any, ...]] = {
    "rmsnorm": (True,),
    "rms_norm": (True,),
    "norm_before_gate": (False,),
    "D_has_hdim": (False,),
}
FLA_TRAINING = frozenset({"use_l2warp"})
FLA_HARMLESS = frozenset(FLA_NAMES) | {"A_init_range", "conv_init", "fuse_norm", "fuse_swiglu"}
FLA_HARMLESS |= {"fuse_cross_entropy", "fuse_linear_cross_entropy"}
"""Names that are read, first values, and the choice of kernels; ``fuse_norm`` is ignored by fla's class."""


@dataclass(kw_only=True)
class Mamba2Config(ModelConfig):
    """Hyper-parameters of a Mamba2 language model; names and defaults are transformers'."""

    MODEL_TYPE: ClassVar[str] = "mamba2"
    OPS: ClassVar[tuple[str, ...]] = ("grow_state", "grow_features")
    RECURRENCE: ClassVar[Recurrence] = "ssd"
    FIXED: ClassVar[Mapping[str, tuple[Any, ...]]] = FLA_FIXED
    TRAINING: ClassVar[frozenset[str]] = FLA_TRAINING
    HARMLESS: ClassVar[frozenset[str]] = FLA_HARMLESS | {"time_step_rank"}

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
        if not has_fla_keys(values):
            return values
        hints = typing.get_type_hints(cls)
        for key, name in FLA_NAMES.items():
            if key in values:
                check_type(key, values[key], hints[name])
        return with_transformers_keys(values)

    def with_all_names(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return the contents of fla's ``config.json`` with what transformers reads of it beside; others unchanged."""
        if not has_fla_keys(values):
            return values
        named = ("num_heads", "head_dim", "n_groups", *FLA_NAMES.values())
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
        grows = expansion is not None and expansion.op == "grow_state"
        d_state = self.state_size * (expansion.factor if expansion and grows else 1)
        geometry = StateGeometry(
            num_heads=self.num_heads,
            key_dim=d_state,
            value_dim=self.head_dim,
            num_key_groups=self.n_groups,
            conv_channels=self.inner_size + 2 * self.n_groups * d_state,
            conv_kernel=self.conv_kernel,
            chunk_size=self.chunk_size,
        )
        return expansion.with_features(geometry) if expansion else geometry


def has_fla_keys(values: Mapping[str, Any]) -> bool:
    """Return whether a ``config.json`` of ``model_type`` mamba2 was written by flash-linear-attention."""
    return any(key in values for key in (*FLA_FIXED, *FLA_TRAINING, *FLA_HARMLESS))


def with_transformers_keys(values: dict[str, Any]) -> dict[str, Any]:
    """Return fla's keys with those of transformers beside them.

    Raises:
        CheckpointError: Both libraries' names of one value are there, and they differ.
    """
    said = dict(FLA_DEFAULTS)
    for key, (name, default) in _FUNCTION.items():
        value = values.get(key, default)
        if name in values and not _equal(values[name], value):
            shown = "missing" if key not in values else repr(value)
            raise CheckpointError(
                f"{CONFIG_NAME}: {name}={values[name]!r} of transformers' Mamba2 and {key} ({shown}; default "
                f"{default!r}) of flash-linear-attention's contradict each other: each library reads its own; set both "
                "to the value that the model was trained with"
            )
        said[name] = value
    said |= {name: values[key] for key, name in _INITIALISATION.items() if key in values}
    size, width = (values.get(key, default) for key, default in (("hidden_size", None), ("expand", 2)))
    head_dim = values.get("head_dim", FLA_DEFAULTS["head_dim"])
    # fla's layer computes a missing number of heads in this way.
    if not values.get("num_heads") and all(type(n) is int and n > 0 for n in (size, width, head_dim)):
        values = {**values, "num_heads": width * size // head_dim}  # type: ignore[operator]
    return {**said, **values, **{name: said[name] for name in FLA_NAMES.values() if name in said}}


def _equal(first: Any, second: Any) -> bool:
    lists = (tuple(value) if isinstance(value, list | tuple) else value for value in (first, second))
    return next(lists) == next(lists)
