"""Models of the delta rule: what Gated DeltaNet and Kimi Delta Attention share, and Gated DeltaNet itself.

The delta rule updates ``S_t = (I - b k k^T) diag(a) S_{t-1} + b k v^T``: the transition acts on the key side alone, so
value columns are independent and a head may store other heads' values beside its own, exactly (*mix_heads*). But
``k k^T`` couples all key channels of a head: heads read as one would correct each other's writes, which is another
function, and no choice of parameters makes it the original's. A true merge is therefore refused.

Configuration keys are those of flash-linear-attention's ``GatedDeltaNetConfig`` and ``KDAConfig``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from statex_dist.errors import CheckpointError
from statex_dist.models import fla
from statex_dist.models.config import Recurrence
from statex_dist.models.fla import MIX_NAME, FLAConfig, block_tensors
from statex_dist.models.layout import LayerUnits, TensorSpec, expansion_tensors, layer_units
from statex_dist.models.registry import Family
from statex_dist.models.row_mapping import Distribution, LogUniform, RowMapping, TimeStep, head_mappings
from statex_dist.state.geometry import StateGeometry
from statex_dist.state.plan import LayerExpansion

DYNAMICS = ("attn.A_log", "attn.dt_bias")


@dataclass(kw_only=True)
class DeltaRuleConfig(FLAConfig):
    """Keys that flash-linear-attention's ``GatedDeltaNetConfig`` and ``KDAConfig`` share."""

    OPS: ClassVar[tuple[str, ...]] = ("mix_heads", "grow_features")
    RECURRENCE: ClassVar[Recurrence] = "delta_rule"

    num_heads: int
    head_dim: int
    expand_v: float
    num_v_heads: int | None = None
    use_short_conv: bool = True
    conv_size: int = 4
    allow_neg_eigval: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("num_heads", "head_dim", "num_v_heads", "conv_size")
        self.check_sizes("expand_v")
        if self.value_heads % self.num_heads:
            raise CheckpointError(
                f"{self.MODEL_TYPE} config: num_v_heads={self.num_v_heads} must be a multiple of "
                f"num_heads={self.num_heads}"
            )
        if (
            not math.isclose(self.head_dim * self.expand_v, self.head_value_dim, rel_tol=1e-5)
            or not self.head_value_dim
        ):
            raise CheckpointError(
                f"{self.MODEL_TYPE} config: expand_v={self.expand_v} times head_dim={self.head_dim} is not a whole "
                "number"
            )
        self.check_plan()

    def why_not(self, op: str) -> str:
        """Explain why heads of a delta rule cannot be merged, nor their keys grown."""
        if op == "merge_heads":
            return (
                f"heads of {self.MODEL_TYPE} cannot be merged: the delta rule couples all key channels of a head "
                "(I - b k k^T), so a merged head computes another function"
            )
        if op == "grow_state":
            return (
                f"key channels of {self.MODEL_TYPE} cannot be grown: keys and queries are normalised over a whole "
                "head, so new channels change the old ones"
            )
        return super().why_not(op)

    def check_expansion(self, expansion: LayerExpansion) -> None:
        """Raise if there are fewer heads than partners."""
        self._check_head_factor(expansion, self.value_heads)

    @property
    def value_heads(self) -> int:
        """Value heads, each with a recurrence of its own; several may share a key head."""
        return self.num_v_heads or self.num_heads

    @property
    def head_value_dim(self) -> int:
        """Value channels of a value head."""
        return round(self.head_dim * self.expand_v)

    @property
    def key_dim(self) -> int:
        """Key channels of all key heads together."""
        return self.num_heads * self.head_dim

    @property
    def value_dim(self) -> int:
        """Value channels of all value heads together."""
        return self.value_heads * self.head_value_dim

    def layer_geometry(self, layer: int) -> StateGeometry:
        """Return the state of ``layer`` under the plan."""
        expansion = self.statex.get(layer) if self.statex else None
        mixes = expansion is not None and expansion.op == "mix_heads"
        geometry = StateGeometry(
            num_heads=self.value_heads,
            key_dim=self.head_dim,
            value_dim=self.head_value_dim,
            num_key_groups=self.num_heads,
            values_per_key=expansion.factor if expansion and mixes else 1,
            conv_channels=2 * self.key_dim + self.value_dim if self.use_short_conv else 0,
            conv_kernel=self.conv_size if self.use_short_conv else 0,
        )
        return expansion.with_features(geometry) if expansion else geometry


def conv_tensors(config: DeltaRuleConfig, units: LayerUnits) -> dict[str, TensorSpec]:
    """Return the short convolutions of queries, keys and values, by name without the layer's prefix."""
    if not config.use_short_conv:
        return {}
    keys, values = (config.key_dim, units.keys), (config.value_dim, units.values)
    return {
        f"attn.{name}_conv1d.weight": TensorSpec(shape=(size, 1, config.conv_size), decay=False, units=(cut,))
        for name, (size, cut) in {"q": keys, "k": keys, "v": values}.items()
    }


def mixing_mappings(
    layer_tensors: Callable[[Any, int], dict[str, TensorSpec]],
    first_value: Callable[..., Distribution],
    config: DeltaRuleConfig,
    after: DeltaRuleConfig,
    expansion: LayerExpansion,
) -> dict[str, RowMapping]:
    """Return a row mapping for each tensor of an expanded layer that changes or is new, by name without the prefix.

    Args:
        layer_tensors: The family's.
        first_value: The family's.
        config: Configuration of the original model.
        after: Configuration of the expanded model.
        expansion: What is done to the layer.
    """
    before = layer_tensors(config, expansion.layer)
    return head_mappings(
        expansion,
        before,
        layer_tensors(after, expansion.layer),
        partial(first_value, config=config),
        num_heads=config.value_heads,
        mix=MIX_NAME,
        redrawn_names=[n for n in before if n.startswith("attn.") and "norm" not in n and n not in DYNAMICS],
        norms=("attn_norm.weight", "attn.o_norm.weight"),
        dynamics=DYNAMICS,
    )


@dataclass(kw_only=True)
class GatedDeltaNetConfig(DeltaRuleConfig):
    """Hyper-parameters of a Gated DeltaNet language model."""

    MODEL_TYPE: ClassVar[str] = "gated_deltanet"

    num_heads: int = 6
    head_dim: int = 256
    expand_v: float = 2.0
    use_gate: bool = True
    output_gate_activation: str = "swish"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_allowed("output_gate_activation", "swish", "silu", "sigmoid")


def layer_tensors(config: GatedDeltaNetConfig, layer: int) -> dict[str, TensorSpec]:
    """Return the tensors of one layer under the plan, by name without the layer's prefix."""
    hidden, keys, values, heads = config.hidden_size, config.key_dim, config.value_dim, config.value_heads
    geometry = config.layer_geometry(layer)
    units = layer_units(geometry)
    by_key, by_head, by_value = (units.keys,), (units.heads,), (units.values,)
    specs = {
        "attn.A_log": TensorSpec(shape=(heads,), decay=False, units=by_head),
        **expansion_tensors(geometry, "attn"),
        "attn.dt_bias": TensorSpec(shape=(heads,), decay=False, units=by_head),
        "attn.q_proj.weight": TensorSpec(shape=(keys, hidden), units=by_key),
        "attn.k_proj.weight": TensorSpec(shape=(keys, hidden), units=by_key),
        "attn.v_proj.weight": TensorSpec(shape=(values, hidden), units=by_value),
        "attn.b_proj.weight": TensorSpec(shape=(heads, hidden), units=by_head),
        **conv_tensors(config, units),
        "attn.o_proj.weight": TensorSpec(shape=(hidden, values), axis=1, units=by_value),
        "attn.a_proj.weight": TensorSpec(shape=(heads, hidden), units=by_head),
    }
    if config.use_gate:
        specs["attn.g_proj.weight"] = TensorSpec(shape=(values, hidden), units=by_value)
    specs["attn.o_norm.weight"] = TensorSpec(shape=(config.head_value_dim,), decay=False, units=(units.norm,))
    return block_tensors(config, specs)


def first_value(suffix: str, shape: tuple[int, ...], *, config: GatedDeltaNetConfig) -> Distribution:
    """Return the distribution of the tensor ``suffix`` (name without the layer's prefix)."""
    if suffix == "attn.A_log":
        return LogUniform(0.0, 16.0)
    if suffix == "attn.dt_bias":
        return TimeStep(0.001, 0.1, 1e-4)
    return fla.first_value(suffix, shape, config=config)


FAMILY = Family(
    config=GatedDeltaNetConfig,
    names=fla.NAMES,
    layer_tensors=layer_tensors,
    first_value=first_value,
    layer_mappings=partial(mixing_mappings, layer_tensors, first_value),
    block="statex_dist.models.gated_deltanet.mixer:GatedDeltaNetBlock",
)
