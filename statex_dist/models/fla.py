"""Common parts of the models of flash-linear-attention: configuration keys, tensors, first values.

Every one of them is a stack of pre-norm blocks ``attn_norm, attn, mlp_norm, mlp`` with a SwiGLU MLP, and any of them
may have softmax attention in some layers (``attn`` in its config). Those are run and trained, and never expanded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from statex_dist.errors import CheckpointError, shown
from statex_dist.models.attention_layers import AttentionLayer, AttentionSizes
from statex_dist.models.config import LARGEST_SIZE, ModelConfig, check_layer_list, check_type, is_layer
from statex_dist.models.config_keys import check_other_keys
from statex_dist.models.layout import GAIN_NAME, Names, TensorSpec, Units
from statex_dist.models.row_mapping import Constant, Distribution, Normal, Uniform
from statex_dist.state.geometry import StateGeometry
from statex_dist.state.plan import LayerExpansion

NAMES = Names(trunk="model", final_norm="norm")

MIX_NAME = "attn.mix"
"""The mixing matrix M of a ``mix_heads`` layer (ours; public checkpoints have none)."""

_ATTENTION_KEYS: dict[str, Any] = {
    **dict.fromkeys(("num_heads", "num_kv_heads", "window_size"), int | None),
    "qkv_bias": bool | None,
    "rope_theta": float | None,
}
"""Keys of an entry of ``attn`` beside its ``layers``, and their types."""


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
        self._check_attention()

    def _check_attention(self) -> None:
        """Raise unless ``attn`` describes attention in layers of the model."""
        groups, where = self._attention_groups, f"{self.MODEL_TYPE} config: attn"
        if len(groups) > self.num_hidden_layers:
            raise CheckpointError(f"{where} has {len(groups)} entries for {self.num_hidden_layers} layers")
        self._group_of: dict[int, int] = {}
        self._built: dict[int, AttentionLayer] = {}
        for place, group in enumerate(groups):
            if not isinstance(group, dict) or not isinstance(group.get("layers"), list):
                raise CheckpointError(
                    f"{where} must be a mapping with a list 'layers', or a list of such, not {shown(self.attn)}"
                )
            check_layer_list(f"{where}.layers", group["layers"], self.num_hidden_layers)
            for layer in group["layers"]:
                if not is_layer(layer, self.num_hidden_layers):
                    raise CheckpointError(f"{where} names layer {shown(layer)}, which does not exist")
                if layer in self._group_of:
                    raise CheckpointError(f"{where} names layer {layer} twice")
                self._group_of[layer] = place
            attention_sizes(group, self.hidden_size, where)
            harmless = frozenset(_ATTENTION_KEYS) | {"layers"}
            check_other_keys(f"{self.MODEL_TYPE} attn", group, fixed={}, training=(), harmless=harmless)

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

    def attention_layer(self, layer: int) -> AttentionLayer:
        """Return one of the attention layers; those of one entry of ``attn`` are alike."""
        place = self._group_of[layer]
        if place not in self._built:
            where = f"{self.MODEL_TYPE} config: attn"
            sizes = attention_sizes(self._attention_groups[place], self.hidden_size, where)
            self._built[place] = AttentionLayer(
                sizes=sizes,
                block="statex_dist.models.core.attention:FLAAttentionBlock",
                tensors=block_tensors(self, attention_tensors(sizes, self.hidden_size)),
                first_value=partial(first_value, config=self),
            )
        return self._built[place]

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


def attention_sizes(group: Mapping[str, Any], hidden_size: int, where: str) -> AttentionSizes:
    """Return the sizes of the attention layers of an entry of ``attn``, with flash-linear-attention's defaults.

    Its classes hand nothing else to their attention layers, ``qk_norm`` neither.

    Args:
        group: The entry.
        hidden_size: Of the model, which the heads divide.
        where: The key, for messages.

    Raises:
        CheckpointError: A value is missing, wrong, or of a variant that we do not support.
    """
    for key, hint in _ATTENTION_KEYS.items():
        check_type(f"attn.{key}", value := group.get(key), hint)
        if type(value) is int and not 1 <= value <= LARGEST_SIZE:
            raise CheckpointError(f"{where}.{key} must be from 1 to {LARGEST_SIZE}, not {shown(value)}")
    heads = group.get("num_heads")
    if heads is None:
        raise CheckpointError(f"{where} has no num_heads, which flash-linear-attention asks for")
    if hidden_size % heads:
        raise CheckpointError(f"{where}: num_heads={heads} does not divide hidden_size={hidden_size}")
    sizes = AttentionSizes(
        num_heads=heads,
        num_kv_heads=group.get("num_kv_heads") or heads,
        head_dim=hidden_size // heads,
        bias=bool(group.get("qkv_bias")),
        rotary_dim=hidden_size // heads,
        rotary_base=10000.0 if group.get("rope_theta") is None else group["rope_theta"],
        window=group.get("window_size"),
    )
    sizes.check(where)
    return sizes


def attention_tensors(sizes: AttentionSizes, hidden_size: int) -> dict[str, TensorSpec]:
    """Return the tensors of flash-linear-attention's ``Attention``, by name without the layer's prefix."""
    specs = {}
    for (name, rows), units in zip(sizes.parts, sizes.units, strict=True):
        specs[f"attn.{name}_proj.weight"] = TensorSpec(shape=(rows, hidden_size), units=(units,))
        if sizes.bias:
            specs[f"attn.{name}_proj.bias"] = TensorSpec(shape=(rows,), decay=False, units=(units,))
    out = TensorSpec(shape=(hidden_size, sizes.query_size), axis=1, units=sizes.units[:1])
    return {**specs, "attn.o_proj.weight": out}


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
