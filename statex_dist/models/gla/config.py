"""A GLA model: configuration (the keys of flash-linear-attention's ``GLAConfig``), tensors, first values, expansion.

Beside merging and mixing heads, *grow_state* gives every head more key channels. ``lossless`` makes the new query rows
zero and leaves keys and gates of the new channels random: they are written but not read until the queries have
learned. The scale of the queries stays that of the original channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from statex_dist.errors import CheckpointError, ConfigError
from statex_dist.models import fla
from statex_dist.models.fla import MIX_NAME, FLAConfig, block_tensors, head_geometry
from statex_dist.models.layout import TensorSpec, expansion_tensors, layer_units
from statex_dist.models.registry import Family
from statex_dist.models.row_mapping import (
    Constant,
    Distribution,
    RowMapping,
    Uniform,
    from_blocks,
    grown_groups,
    head_mappings,
    repeated,
)
from statex_dist.state.geometry import StateGeometry
from statex_dist.state.plan import LayerExpansion

GATE_LOW_RANK_DIM = 16
GATE_LOGIT_NORMALIZER = 16

XAVIER_GAIN = 2**-2.5
"""Of flash-linear-attention's GLA layer before a model's own initialisation runs over it."""

TOKEN_MIXING = ("q_proj", "k_proj", "v_proj", "g_proj", "o_proj", "gk_proj", "q_conv1d", "k_conv1d", "v_conv1d")
KEY_SIDE = (
    "q_proj.weight",
    "k_proj.weight",
    "gk_proj.1.weight",
    "gk_proj.1.bias",
    "q_conv1d.weight",
    "k_conv1d.weight",
)


@dataclass(kw_only=True)
class GLAConfig(FLAConfig):
    """Hyper-parameters of a GLA language model.

    ``expand_k`` and ``expand_v`` size keys and values relative to ``hidden_size``; ``gate_logit_normalizer`` divides
    the log-sigmoid gate (16 in the public models, which do not store it).
    """

    MODEL_TYPE: ClassVar[str] = "gla"
    OPS: ClassVar[tuple[str, ...]] = ("merge_heads", "mix_heads", "grow_state", "grow_features")
    FIXED: ClassVar[Mapping[str, tuple[Any, ...]]] = {**FLAConfig.FIXED, "elementwise_affine": (True,)}
    HARMLESS: ClassVar[frozenset[str]] = FLAConfig.HARMLESS | {"use_gk", "use_gv"}
    """fla's model reads neither of the two."""

    num_heads: int
    expand_k: float = 0.5
    expand_v: float = 1.0
    num_kv_heads: int | None = None
    feature_map: str | None = None
    use_short_conv: bool = False
    conv_size: int = 4
    use_output_gate: bool = True
    clamp_min: float | None = None
    gate_logit_normalizer: int = GATE_LOGIT_NORMALIZER

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("num_heads", "conv_size", "gate_logit_normalizer")
        self.check_allowed("num_kv_heads", None, self.num_heads)
        self.check_allowed("feature_map", None)
        self.check_allowed("use_output_gate", True)
        self.check_ignored("GLAForCausalLM", "gate_logit_normalizer", GATE_LOGIT_NORMALIZER)
        self.check_sizes("expand_k", "expand_v")
        if any(size < 1 or size % self.num_heads for size in (self.key_dim, self.value_dim)):
            raise CheckpointError(
                f"{self.MODEL_TYPE} config: num_heads={self.num_heads} must divide the key size {self.key_dim} "
                f"and the value size {self.value_dim}"
            )
        self.check_plan()

    def check_expansion(self, expansion: LayerExpansion) -> None:
        """Raise if heads do not divide, or the initialisation is not one of GLA's."""
        self._check_head_factor(expansion, self.num_heads)
        if expansion.init == "copy":
            raise ConfigError(
                f"plan, layer {expansion.layer}: init copy is for mamba2; use reinit, inherit or lossless"
            )

    @property
    def ours_alone(self) -> bool:
        """Also with another divisor of the gates: flash-linear-attention's model hands none to its layers."""
        return super().ours_alone or self.gate_logit_normalizer != GATE_LOGIT_NORMALIZER

    @property
    def key_dim(self) -> int:
        """Key channels of all heads together, before any expansion.

        Rounded, as from fla 0.6.0 on: 0.29 times 100 is below 29 in binary.
        """
        return round(self.hidden_size * self.expand_k)

    @property
    def value_dim(self) -> int:
        """Value channels of all heads together."""
        return round(self.hidden_size * self.expand_v)

    @property
    def scale(self) -> float:
        """Factor of the queries of a head that is not merged: that of the original key channels, grown or not."""
        return (self.key_dim // self.num_heads) ** -0.5

    def layer_geometry(self, layer: int) -> StateGeometry:
        """Return the state of ``layer`` under the plan."""
        return head_geometry(
            self.statex.get(layer) if self.statex else None,
            num_heads=self.num_heads,
            keys=self.key_dim,
            values=self.value_dim,
            conv_kernel=self.conv_size if self.use_short_conv else 0,
        )


def gate_norm_name(config: GLAConfig) -> str:
    """Return the name of the output norm, which the public models change with ``fuse_norm``."""
    return "attn.g_norm_swish_gate.weight" if config.fuse_norm else "attn.g_norm.weight"


def layer_tensors(config: GLAConfig, layer: int) -> dict[str, TensorSpec]:
    """Return the tensors of one layer under the plan, by name without the layer's prefix."""
    geometry = config.layer_geometry(layer)
    hidden, keys, values = config.hidden_size, geometry.num_heads * geometry.projected_key_dim, config.value_dim
    units = layer_units(geometry)
    by_key, by_value = (units.keys,), (units.values,)
    specs = {
        **expansion_tensors(geometry, "attn"),
        "attn.q_proj.weight": TensorSpec(shape=(keys, hidden), units=by_key),
        "attn.k_proj.weight": TensorSpec(shape=(keys, hidden), units=by_key),
        "attn.v_proj.weight": TensorSpec(shape=(values, hidden), units=by_value),
        "attn.g_proj.weight": TensorSpec(shape=(values, hidden), units=by_value),
        "attn.gk_proj.0.weight": TensorSpec(shape=(GATE_LOW_RANK_DIM, hidden)),
        "attn.gk_proj.1.weight": TensorSpec(shape=(keys, GATE_LOW_RANK_DIM), units=by_key),
        "attn.gk_proj.1.bias": TensorSpec(shape=(keys,), decay=False, units=by_key),
        "attn.o_proj.weight": TensorSpec(shape=(hidden, values), axis=1, units=by_value),
        gate_norm_name(config): TensorSpec(shape=(geometry.value_dim,), decay=False, units=(units.norm,)),
    }
    if config.use_short_conv:
        for name, channels, cut in (("q", keys, by_key), ("k", keys, by_key), ("v", values, by_value)):
            shape = (channels, 1, config.conv_size)
            specs[f"attn.{name}_conv1d.weight"] = TensorSpec(shape=shape, decay=False, units=cut)
    return block_tensors(config, specs)


def first_value(suffix: str, shape: tuple[int, ...], *, config: GLAConfig, layer_default: bool = False) -> Distribution:
    """Return the distribution of the tensor ``suffix`` (name without the layer's prefix).

    Args:
        suffix: Name without the layer's prefix.
        shape: Shape of the tensor.
        config: The model's configuration.
        layer_default: Whether matrices are drawn as the layer does by itself (Xavier, gain 2^-2.5), which is what the
            StateX authors' script leaves, since it replaces layers after the model's initialisation has run.
    """
    if layer_default and "proj" in suffix and suffix.endswith(".weight"):
        return Uniform(XAVIER_GAIN * math.sqrt(6 / sum(shape)))
    return fla.first_value(suffix, shape, config=config)


def layer_mappings(config: GLAConfig, after: GLAConfig, expansion: LayerExpansion) -> dict[str, RowMapping]:
    """Return a row mapping for each tensor of an expanded layer that changes or is new, by name without the prefix."""
    before, target = layer_tensors(config, expansion.layer), layer_tensors(after, expansion.layer)
    norm = gate_norm_name(config)
    mappings = {norm: repeated(before[norm].shape, expansion.factor)} if expansion.op == "merge_heads" else {}
    if expansion.op == "grow_state" and expansion.init != "reinit":
        mappings |= _grown(config, expansion)
    return mappings | head_mappings(
        expansion,
        before,
        target,
        partial(first_value, config=config, layer_default=expansion.reset_dynamics),
        num_heads=config.num_heads,
        mix=MIX_NAME,
        redrawn_names=[name for name in before if name.startswith("attn.") and name.split(".")[1] in TOKEN_MIXING],
        norms=("attn_norm.weight", norm),
    )


def _grown(config: GLAConfig, expansion: LayerExpansion) -> dict[str, RowMapping]:
    """Return mappings that put new key channels behind the old ones of each head."""
    mappings = {}
    for name, spec in layer_tensors(config, expansion.layer).items():
        if name.removeprefix("attn.") not in KEY_SIDE:
            continue
        new = first_value(name, spec.shape, config=config)
        if expansion.init == "lossless" and name == "attn.q_proj.weight":
            new = Constant(0.0)
        rows = config.key_dim // config.num_heads
        blocks = grown_groups(0, groups=config.num_heads, rows=rows, factor=expansion.factor, new=new)
        mappings[name] = from_blocks(spec.shape, blocks)
    return mappings


FAMILY = Family(
    config=GLAConfig,
    names=fla.NAMES,
    layer_tensors=layer_tensors,
    first_value=first_value,
    layer_mappings=layer_mappings,
    block="statex_dist.models.gla.mixer:GLABlock",
)
