"""Common parts of the models of flash-linear-attention: configuration keys, tensors, first values.

Every one of them is a stack of pre-norm blocks ``attn_norm, attn, mlp_norm, mlp`` with a SwiGLU MLP, and any of them
may have softmax attention in some layers (``attn`` in its config). Those layers are passed through by the offline
tools; a model that has them cannot be run here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from statex_dist.errors import CheckpointError, shown
from statex_dist.models.config import ModelConfig, check_layer_list, is_layer
from statex_dist.models.layout import GAIN_NAME, Names, TensorSpec, Units
from statex_dist.models.row_mapping import Constant, Distribution, Normal, Uniform
from statex_dist.state.geometry import StateGeometry
from statex_dist.state.plan import LayerExpansion

NAMES = Names(trunk="model", final_norm="norm")

MIX_NAME = "attn.mix"
"""The mixing matrix M of a ``mix_heads`` layer (ours; public checkpoints have none)."""


@dataclass(kw_only=True)
class FLAConfig(ModelConfig):
    """Keys that all of flash-linear-attention's configs share; a family's own follow in its subclass."""

    FIXED: ClassVar[Mapping[str, tuple[Any, ...]]] = {"attnres_block_size": (None,)}
    TRAINING: ClassVar[frozenset[str]] = frozenset({"use_l2warp"})
    HARMLESS: ClassVar[frozenset[str]] = frozenset(
        {"attn_mode", "fuse_swiglu", "fuse_cross_entropy", "fuse_linear_cross_entropy", "max_position_embeddings"}
    )

    hidden_ratio: int | None = 4
    intermediate_size: int | None = None
    hidden_act: str = "swish"
    norm_eps: float = 1e-6
    fuse_norm: bool = True
    attn: dict | list | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("intermediate_size", "hidden_ratio")
        self.check_allowed("hidden_act", "swish", "silu")
        groups = self._attention_groups
        if len(groups) > self.num_hidden_layers:
            raise CheckpointError(
                f"{self.MODEL_TYPE} config: attn has {len(groups)} entries for {self.num_hidden_layers} layers"
            )
        for group in groups:
            if not isinstance(group, dict) or not isinstance(group.get("layers"), list):
                raise CheckpointError(
                    f"{self.MODEL_TYPE} config: attn must be a mapping with a list 'layers', or a list of such, not "
                    f"{shown(self.attn)}"
                )
            check_layer_list(f"{self.MODEL_TYPE} config: attn.layers", group["layers"], self.num_hidden_layers)
            for layer in group["layers"]:
                if not is_layer(layer, self.num_hidden_layers):
                    raise CheckpointError(
                        f"{self.MODEL_TYPE} config: attn names layer {shown(layer)}, which does not exist"
                    )

    def check_allowed(self, name: str, *allowed: object) -> None:
        """Raise if a field has a value that we do not support."""
        if (given := getattr(self, name)) not in allowed:
            raise CheckpointError(
                f"{self.MODEL_TYPE} config: {name}={shown(given)} is not supported; allowed: {allowed}"
            )

    def check_ignored(self, fla_class: str, name: str, value: object) -> None:
        """Raise if a field differs from ``value`` in a config of flash-linear-attention's, whose class never reads it.

        Raises:
            CheckpointError: We would compute another function than the class that wrote the weights.
        """
        architectures = self.extra.get("architectures")
        if isinstance(architectures, list) and fla_class in architectures and getattr(self, name) != value:
            raise CheckpointError(
                f"{self.MODEL_TYPE} config: {name}={getattr(self, name)!r} is not what {fla_class} computes, which "
                f"ignores it; with {value!r} the model is opened as that class opens it"
            )

    @property
    def _attention_groups(self) -> list[Any]:
        """Entries of ``attn``; an empty mapping has none."""
        return [self.attn] if isinstance(self.attn, dict) and self.attn else list(self.attn or [])

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Layers with softmax attention in place of the recurrence."""
        return tuple(sorted(layer for group in self._attention_groups for layer in group["layers"]))

    @property
    def mlp_size(self) -> int:
        """Inner size of the MLP: ``intermediate_size``, or 2/3 of the ratio rounded up to a multiple of 256."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        size = int(self.hidden_size * (self.hidden_ratio or 4) * 2 / 3)
        return 256 * ((size + 255) // 256)

    @property
    def final_norm_eps(self) -> float:
        """Epsilon of the RMS norms."""
        return self.norm_eps


def head_geometry(
    expansion: LayerExpansion | None, *, num_heads: int, keys: int, values: int, conv_kernel: int = 0
) -> StateGeometry:
    """Return the state of a layer whose heads can be merged and mixed and whose keys can grow.

    Args:
        expansion: What is done to the layer, if anything.
        num_heads: Heads before it.
        keys: Key channels of all heads together, before it.
        values: Value channels of all heads together.
        conv_kernel: Width of the convolutions of queries, keys and values; 0 without any.
    """
    values_per_key = 1
    if expansion is not None:
        if expansion.op == "merge_heads":
            num_heads //= expansion.factor
        elif expansion.op == "mix_heads":
            values_per_key = expansion.factor
        elif expansion.op == "grow_state":
            keys *= expansion.factor
    geometry = StateGeometry(
        num_heads=num_heads,
        key_dim=keys // num_heads,
        value_dim=values // num_heads,
        num_key_groups=num_heads,
        values_per_key=values_per_key,
        conv_channels=2 * keys + values if conv_kernel else 0,
        conv_kernel=conv_kernel,
    )
    return geometry if expansion is None else expansion.with_features(geometry)


def block_tensors(config: FLAConfig, mixing: dict[str, TensorSpec]) -> dict[str, TensorSpec]:
    """Return the tensors of a layer around those of its token mixing, by name without the layer's prefix."""
    hidden, inner = config.hidden_size, config.mlp_size
    channels = (Units(inner),)
    return {
        "attn_norm.weight": TensorSpec(shape=(hidden,), decay=False),
        **mixing,
        "mlp_norm.weight": TensorSpec(shape=(hidden,), decay=False),
        "mlp.gate_proj.weight": TensorSpec(shape=(inner, hidden), units=channels),
        "mlp.up_proj.weight": TensorSpec(shape=(inner, hidden), units=channels),
        "mlp.down_proj.weight": TensorSpec(shape=(hidden, inner), axis=1, units=channels),
    }


def first_value(suffix: str, shape: tuple[int, ...], *, config: FLAConfig) -> Distribution:
    """Return the distribution of the tensor ``suffix`` (name without the layer's prefix).

    Matrices are N(0, initializer_range^2), biases 0, norms 1; convolutions take torch's own uniform rule, because at
    ``initializer_range`` four taps would all but silence keys and values. The mixing matrix starts at ``1/sqrt(r)``,
    StateX's merge of ``r`` heads expressed in M.
    """
    if "norm" in suffix:
        return Constant(1.0)
    if suffix == MIX_NAME:
        return Constant(shape[1] ** -0.5)
    if suffix.endswith((".bias", GAIN_NAME)):
        return Constant(0.0)
    if "conv1d" in suffix:
        return Uniform(1 / math.sqrt(shape[-1]))
    return Normal(config.initializer_range)
