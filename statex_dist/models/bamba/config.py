"""A Bamba model (the keys of transformers' ``BambaConfig``), seen from its Mamba2 layers under its own names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from statex_dist.errors import CheckpointError, shown
from statex_dist.models.config import ModelConfig, Recurrence, check_layer_list, is_layer
from statex_dist.models.layout import Names, TensorSpec
from statex_dist.models.mamba2 import tensors as mamba2
from statex_dist.models.mamba2.config import Mamba2Config
from statex_dist.models.registry import Family
from statex_dist.models.row_mapping import Distribution, RowMapping
from statex_dist.state.geometry import StateGeometry
from statex_dist.state.plan import ExpansionPlan, LayerExpansion


@dataclass(kw_only=True)
class BambaConfig(ModelConfig):
    """The keys of a Bamba model that its Mamba2 layers depend on; all others are kept as they are."""

    MODEL_TYPE: ClassVar[str] = "bamba"
    OPS: ClassVar[tuple[str, ...]] = ("grow_state",)
    RECURRENCE: ClassVar[Recurrence] = "ssd"
    HARMLESS: ClassVar[frozenset[str]] = frozenset(
        {
            # The models are run by other software alone.
            "intermediate_size",
            "num_attention_heads",
            "num_key_value_heads",
            "hidden_act",
            "num_logits_to_keep",
            "max_position_embeddings",
            "attention_dropout",
            "mamba_chunk_size",
            "time_step_limit",
            "z_loss_coefficient",
            "rope_parameters",
            "rope_theta",
            "rope_scaling",
            "partial_rotary_factor",
            "attention_bias",
            "mlp_bias",
        }
    )

    mamba_n_heads: int
    mamba_d_head: int | str = "auto"
    mamba_d_state: int = 256
    mamba_n_groups: int = 1
    mamba_d_conv: int = 4
    mamba_expand: int = 2
    mamba_conv_bias: bool = True
    mamba_proj_bias: bool = False
    attn_layer_indices: list | None = None
    rms_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("mamba_n_heads", "mamba_d_state", "mamba_n_groups", "mamba_d_conv", "mamba_expand")
        inner = self.mamba_expand * self.hidden_size
        if self.mamba_d_head == "auto":
            self.mamba_d_head = inner // self.mamba_n_heads
        if not isinstance(self.mamba_d_head, int):
            raise CheckpointError(f"bamba config: mamba_d_head={shown(self.mamba_d_head)} must be a number or 'auto'")
        check_layer_list("bamba config: attn_layer_indices", self.attn_layer_indices or (), self.num_hidden_layers)
        for layer in self.attn_layer_indices or ():
            if not is_layer(layer, self.num_hidden_layers):
                raise CheckpointError(
                    f"bamba config: attn_layer_indices names layer {shown(layer)}, which does not exist"
                )
        self.check_plan()
        self.mamba2()

    def mamba2(self) -> Mamba2Config:
        """Return the same layers as a Mamba2 model's configuration, plan included."""
        assert isinstance(self.mamba_d_head, int)
        return Mamba2Config(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_heads=self.mamba_n_heads,
            head_dim=self.mamba_d_head,
            state_size=self.mamba_d_state,
            n_groups=self.mamba_n_groups,
            conv_kernel=self.mamba_d_conv,
            expand=self.mamba_expand,
            use_bias=self.mamba_proj_bias,
            use_conv_bias=self.mamba_conv_bias,
            initializer_range=self.initializer_range,
            statex=self.statex,
        )

    def why_not(self, op: str) -> str:
        """Explain that features need code of ours in the layer."""
        if op == "grow_features":
            return "op grow_features does not apply to bamba: transformers runs its layers, and has no features"
        return super().why_not(op)

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Layers with softmax attention."""
        return tuple(self.attn_layer_indices or ())

    @property
    def obstacle(self) -> str | None:
        """Bamba's blocks are not run here."""
        return "bamba models are run by transformers"

    @property
    def final_norm_eps(self) -> float:
        """Epsilon of the RMS norms."""
        return self.rms_norm_eps

    def plain_keys(self) -> dict[str, Any]:
        """Return the grown ``mamba_d_state`` where every Mamba2 layer grows by the same factor."""
        factor = self.common_factor()
        return {"mamba_d_state": self.mamba_d_state * factor} if factor else {}

    def layer_geometry(self, layer: int) -> StateGeometry:
        """Return the state of a Mamba2 layer under the plan."""
        expansion = self.statex.get(layer) if self.statex else None
        plan = ExpansionPlan(layers=(expansion,)) if expansion else None  # of this layer alone: it is checked each time
        return self.replace(statex=plan).mamba2().layer_geometry(layer)


def renamed(suffix: str) -> str | None:
    """Return Bamba's name of a Mamba2 tensor, or None for one outside the mixer."""
    return suffix.replace("mixer.", "mamba.", 1) if suffix.startswith("mixer.") else None


def layer_tensors(config: BambaConfig, layer: int) -> dict[str, TensorSpec]:
    """Return the mixer's tensors of one Mamba2 layer under the plan; its norms and MLP are passed through."""
    specs = mamba2.layer_tensors(config.mamba2(), layer)
    return {name: spec for suffix, spec in specs.items() if (name := renamed(suffix))}


def first_value(suffix: str, shape: tuple[int, ...], *, config: BambaConfig) -> Distribution:
    """Return the distribution of a mixer's tensor (name without the layer's prefix)."""
    return mamba2.first_value(suffix.replace("mamba.", "mixer.", 1), shape, config=config.mamba2())


def layer_mappings(config: BambaConfig, after: BambaConfig, expansion: LayerExpansion) -> dict[str, RowMapping]:
    """Return a row mapping for each tensor of an expanded layer that changes, by name without the prefix."""
    mappings = mamba2.layer_mappings(config.mamba2(), after.mamba2(), expansion)
    return {name: mapping for suffix, mapping in mappings.items() if (name := renamed(suffix))}


FAMILY = Family(
    config=BambaConfig,
    names=Names(trunk="model", final_norm="final_layernorm", embedding="embed_tokens"),
    layer_tensors=layer_tensors,
    first_value=first_value,
    layer_mappings=layer_mappings,
    block=None,
)
