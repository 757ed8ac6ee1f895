"""A MiniMax model: configuration (the keys of transformers' ``MiniMaxConfig``), tensors, first values, expansion.

flash-linear-attention has Lightning attention as a kernel but no model of it, so names and keys are those of the public
models that use it: MiniMax, which alternates it with softmax attention over a mixture of experts.

The state is that of linear attention with a fixed decay, so what holds for GLA's expansions holds here
(:mod:`statex_dist.models.gla.config`). Queries, keys and values of a head stand together in ``qkv_proj``; the output
norm runs over all heads, so merging heads changes no tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from statex_dist.errors import CheckpointError, ConfigError, shown
from statex_dist.models.config import ModelConfig
from statex_dist.models.fla import head_geometry
from statex_dist.models.hybrid.config import HostModel
from statex_dist.models.hybrid.key_values import grouped
from statex_dist.models.hybrid.names import Joined, NameMap, Rename
from statex_dist.models.layout import GAIN_NAME, Names, Part, TensorSpec, Units, expansion_tensors, layer_units
from statex_dist.models.registry import Family
from statex_dist.models.row_mapping import (
    Block,
    Constant,
    Distribution,
    Fresh,
    Keep,
    Normal,
    RowMapping,
    from_blocks,
    head_mappings,
)
from statex_dist.state.geometry import StateGeometry
from statex_dist.state.plan import LayerExpansion

MAX_EXPERTS = 100_000
"""Of all layers together: each has tensors of its own."""

NAMES = Names(trunk="model", final_norm="norm", embedding="embed_tokens")

MIX_NAME = "self_attn.mix"
"""The mixing matrix M of a ``mix_heads`` layer (ours; public checkpoints have none)."""

QKV = "self_attn.qkv_proj.weight"
TOKEN_MIXING = (QKV, "self_attn.output_gate.weight", "self_attn.out_proj.weight")

LINEAR, FULL = "linear_attention", "full_attention"

HOST = HostModel(
    model="minimax.modeling_minimax:MiniMaxModel",
    layer_kinds=lambda values, count: [],  # LightningConfig reads them
    keys={},
    mixer="hybrid.delta_mixers:HostedLightning",
    place="self_attn",
    cached=grouped(32, 8),
    names=NameMap(
        joined=(
            Joined(
                r"\.mlp\.experts\.gate_up_proj$",
                (".block_sparse_moe.experts.{e}.w1.weight", ".block_sparse_moe.experts.{e}.w3.weight"),
            ),
            Joined(r"\.mlp\.experts\.down_proj$", (".block_sparse_moe.experts.{e}.w2.weight",)),
        ),
        renames=(Rename(r"\.mlp\.", ".block_sparse_moe."),),
    ),
)
"""transformers' model, which runs a MiniMax that has softmax layers."""


@dataclass(kw_only=True)
class LightningConfig(ModelConfig):
    """Hyper-parameters of a MiniMax language model; names and defaults are transformers'."""

    MODEL_TYPE: ClassVar[str] = "minimax"
    OPS: ClassVar[tuple[str, ...]] = ("merge_heads", "mix_heads", "grow_state", "grow_features")
    DERIVED: ClassVar[tuple[str, ...]] = (
        *ModelConfig.DERIVED,
        "self_attn.slope_rate",
        "self_attn.query_decay",
        "self_attn.key_decay",
        "self_attn.diagonal_decay",
    )
    ALIASES: ClassVar[Mapping[str, str]] = {"num_experts": "num_local_experts"}
    TRAINING: ClassVar[frozenset[str]] = frozenset({"output_router_logits", "router_jitter_noise"})
    HARMLESS: ClassVar[frozenset[str]] = frozenset(
        {
            "block_size",
            "router_aux_loss_coef",
            # Of softmax attention, which transformers runs.
            "num_key_value_heads",
            "max_position_embeddings",
            "sliding_window",
            "attention_dropout",
            "rope_parameters",
            "rope_theta",
            "rope_scaling",
            "full_attn_alpha_factor",
            "full_attn_beta_factor",
        }
    )

    num_attention_heads: int
    intermediate_size: int
    head_dim: int | None = None
    num_local_experts: int = 8
    num_experts_per_tok: int = 2
    rms_norm_eps: float = 1e-5
    hidden_act: str = "silu"
    layer_types: list | None = None
    linear_attn_alpha_factor: float = 1
    linear_attn_beta_factor: float = 1
    mlp_alpha_factor: float = 1
    mlp_beta_factor: float = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("num_attention_heads", "intermediate_size", "head_dim", "num_local_experts")
        if self.hidden_act not in ("silu", "swish"):
            raise CheckpointError(
                f"minimax config: hidden_act={shown(self.hidden_act)} is not supported; allowed: 'silu', also called "
                "'swish'"
            )
        for key in ("attn_type_list", "layer_type_list"):
            if self.layer_types is None and self.extra.get(key) is not None:
                raise CheckpointError(
                    f"minimax config: {key} is not read (nor by transformers 5); write layer_types, with {LINEAR} or "
                    f"{FULL} for each layer"
                )
        if not 1 <= self.num_experts_per_tok <= self.num_local_experts:
            raise CheckpointError(
                f"minimax config: num_experts_per_tok={self.num_experts_per_tok} must be 1 to {self.num_local_experts}"
            )
        if self.num_local_experts * self.num_hidden_layers > MAX_EXPERTS:
            raise CheckpointError(
                f"minimax config: num_local_experts={self.num_local_experts} times num_hidden_layers="
                f"{self.num_hidden_layers} must not exceed {MAX_EXPERTS}"
            )
        if len(self.kinds) != self.num_hidden_layers or any(kind not in (LINEAR, FULL) for kind in self.kinds):
            raise CheckpointError(
                f"minimax config: layer_types must name {LINEAR} or {FULL} for each of {self.num_hidden_layers} layers"
            )
        self.check_plan()

    def check_expansion(self, expansion: LayerExpansion) -> None:
        """Raise if the factor does not divide the heads, or this family does not have the initialisation."""
        self._check_head_factor(expansion, self.num_attention_heads)
        if expansion.init == "copy":
            raise ConfigError(
                f"plan, layer {expansion.layer}: init copy is for mamba2; use reinit, inherit or lossless"
            )

    @property
    def kinds(self) -> list[str]:
        """Each layer's kind; transformers' default begins with softmax attention and alternates."""
        if self.layer_types is not None:
            return self.layer_types
        return [LINEAR if layer % 2 else FULL for layer in range(self.num_hidden_layers)]

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Layers with softmax attention."""
        return tuple(layer for layer, kind in enumerate(self.kinds) if kind == FULL)

    @property
    def kv_elements(self) -> int:
        """Numbers of keys and values that all softmax layers keep of a token."""
        sizes = ("num_attention_heads", "hidden_size", "head_dim")
        values = {**self.extra, **{name: getattr(self, name) for name in sizes}}
        return len(self.attention_layers) * HOST.cached(values) if self.attention_layers else 0

    @property
    def HOST(self) -> HostModel | None:  # noqa: N802 (of all hosts)
        """transformers' model where some layers are softmax attention; a model without any is ours alone."""
        return HOST if self.attention_layers else None

    @property
    def text(self) -> dict[str, Any]:
        """The values of transformers' configuration."""
        return {**self.replace(statex=None).to_dict(), "router_jitter_noise": 0.0}

    @property
    def obstacle(self) -> str | None:
        """A window of softmax attention, which is not implemented; else nothing."""
        window = self.extra.get("sliding_window")
        if self.attention_layers and window is not None:
            return f"layers {list(self.attention_layers)} are softmax attention with sliding_window={shown(window)}"
        return None

    @property
    def is_mixed(self) -> bool:
        """Whether there are softmax layers, whose tensors are passed through."""
        return bool(self.attention_layers)

    def place(self, layer: int) -> str:
        """Return the name of a layer's mixer in the layer."""
        return "self_attn"

    def mixer_config(self, layer: int | None = None) -> LightningConfig:
        """Return the configuration of the Lightning layers, which is this one."""
        return self

    def parts(self, name: str, shape: Sequence[int]) -> list[Part]:
        """Return the tensors of the files that a tensor of memory is made of, in order."""
        return HOST.names.parts(name, shape) if self.attention_layers else super().parts(name, shape)

    @property
    def head_size(self) -> int:
        """Key and value channels of a head before any expansion."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def inner_size(self) -> int:
        """Value channels of all heads together."""
        return self.num_attention_heads * self.head_size

    @property
    def final_norm_eps(self) -> float:
        """Epsilon of the RMS norms."""
        return self.rms_norm_eps

    def decay_rates(self, layer: int) -> list[float]:
        """Return each head's decay per token: ``2^(-8 h / H)`` for head ``h = 1..H``, less in later layers."""
        heads = self.num_attention_heads
        depth = 1 - layer / (self.num_hidden_layers - 1 + 1e-5) + 1e-5
        return [2 ** (-8 * (head + 1) / heads) * depth for head in range(heads)]

    def layer_geometry(self, layer: int) -> StateGeometry:
        """Return the state of ``layer`` under the plan."""
        return head_geometry(
            self.statex.get(layer) if self.statex else None,
            num_heads=self.num_attention_heads,
            keys=self.inner_size,
            values=self.inner_size,
        )


def layer_tensors(config: LightningConfig, layer: int) -> dict[str, TensorSpec]:
    """Return the tensors of one Lightning layer under the plan, by name without the layer's prefix.

    ``qkv_proj`` holds, head by head of the original model, the rows of queries, keys and values.
    """
    hidden, inner, geometry = config.hidden_size, config.inner_size, config.layer_geometry(layer)
    heads = config.num_attention_heads
    keys = geometry.num_heads * geometry.projected_key_dim
    rows = (("q", keys // heads), ("k", keys // heads), ("v", inner // heads))
    units = layer_units(geometry)
    by_value, channels = (units.values,), (Units(config.intermediate_size),)
    specs = {"input_layernorm.weight": TensorSpec(shape=(hidden,), decay=False)}
    specs |= expansion_tensors(geometry, "self_attn")
    specs |= {
        "self_attn.qkv_proj.weight": TensorSpec(
            shape=(2 * keys + inner, hidden), parts=rows, blocks=heads, units=(units.keys, units.keys, units.values)
        ),
        "self_attn.out_proj.weight": TensorSpec(shape=(hidden, inner), axis=1, units=by_value),
        "self_attn.output_gate.weight": TensorSpec(shape=(inner, hidden), units=by_value),
        "self_attn.norm.weight": TensorSpec(shape=(inner,), decay=False, units=by_value),
        "post_attention_layernorm.weight": TensorSpec(shape=(hidden,), decay=False),
        "block_sparse_moe.gate.weight": TensorSpec(shape=(config.num_local_experts, hidden)),
    }
    expert_specs = {
        "w1": TensorSpec(shape=(config.intermediate_size, hidden), units=channels),
        "w2": TensorSpec(shape=(hidden, config.intermediate_size), axis=1, units=channels),
        "w3": TensorSpec(shape=(config.intermediate_size, hidden), units=channels),
    }
    for expert in range(config.num_local_experts):
        for name, spec in expert_specs.items():
            specs[f"block_sparse_moe.experts.{expert}.{name}.weight"] = spec
    return specs


def first_value(suffix: str, shape: tuple[int, ...], *, config: LightningConfig) -> Distribution:
    """Return the distribution of the tensor ``suffix`` (name without the layer's prefix)."""
    if "norm" in suffix:
        return Constant(1.0)
    if suffix == MIX_NAME:
        return Constant(shape[1] ** -0.5)
    if suffix.endswith(GAIN_NAME):
        return Constant(0.0)
    return Normal(config.initializer_range)


def layer_mappings(config: LightningConfig, after: LightningConfig, expansion: LayerExpansion) -> dict[str, RowMapping]:
    """Return a row mapping for each tensor of an expanded layer that changes or is new, by name without the prefix."""
    before, target = layer_tensors(config, expansion.layer), layer_tensors(after, expansion.layer)
    mappings = {}
    if expansion.op == "grow_state" and expansion.init != "reinit":
        mappings[QKV] = _grown_qkv(config, expansion, before[QKV].shape)
    return mappings | head_mappings(
        expansion,
        before,
        target,
        partial(first_value, config=config),
        num_heads=config.num_attention_heads,
        mix=MIX_NAME,
        redrawn_names=TOKEN_MIXING,
        norms=("input_layernorm.weight", "self_attn.norm.weight"),
    )


def _grown_qkv(config: LightningConfig, expansion: LayerExpansion, shape: tuple[int, ...]) -> RowMapping:
    """Put new query and key rows behind the old ones of each head; lossless queries start at zero."""
    size, drawn = config.head_size, first_value(QKV, shape, config=config)
    new_query = Constant(0.0) if expansion.init == "lossless" else drawn
    blocks: list[Block] = []
    for head in range(config.num_attention_heads):
        start, rows = 3 * head * size, size * (expansion.factor - 1)
        blocks += [Keep(start, start + size), Fresh(rows, new_query)]
        blocks += [Keep(start + size, start + 2 * size), Fresh(rows, drawn)]
        blocks.append(Keep(start + 2 * size, start + 3 * size))
    return from_blocks(shape, blocks)


FAMILY = Family(
    config=LightningConfig,
    names=NAMES,
    layer_tensors=layer_tensors,
    first_value=first_value,
    layer_mappings=layer_mappings,
    block="statex_dist.models.lightning.mixer:LightningBlock",
)
