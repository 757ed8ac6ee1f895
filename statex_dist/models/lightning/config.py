"""Configuration of a MiniMax model (the keys of transformers' ``MiniMaxConfig``) and its per-layer geometry.

flash-linear-attention has Lightning attention as a kernel but no model of it, so names and keys are those of the public
models that use it: MiniMax, which alternates it with softmax attention over a mixture of experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from statex_dist.errors import CheckpointError, ConfigError, shown
from statex_dist.models.config import ModelConfig
from statex_dist.models.fla import head_geometry
from statex_dist.state.geometry import StateGeometry
from statex_dist.state.plan import LayerExpansion

MAX_EXPERTS = 100_000
"""Of all layers together: each has tensors of its own."""

LINEAR, FULL = "linear_attention", "full_attention"


@dataclass(kw_only=True)
class LightningConfig(ModelConfig):
    """Hyper-parameters of a MiniMax language model; names and defaults are transformers'."""

    MODEL_TYPE: ClassVar[str] = "minimax"
    OPS: ClassVar[tuple[str, ...]] = ("merge_heads", "mix_heads", "grow_state")
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
            # Of softmax attention, which is not run here.
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
        """Raise if heads do not divide, or the initialisation is not one of this family's."""
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
    def recurrent_layers(self) -> tuple[int, ...]:
        """The layers with Lightning attention."""
        return tuple(layer for layer, kind in enumerate(self.kinds) if kind == LINEAR)

    @property
    def obstacle(self) -> str | None:
        """Softmax attention is not run here."""
        full = [layer for layer, kind in enumerate(self.kinds) if kind == FULL]
        return f"layers {full} are softmax attention" if full else None

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
