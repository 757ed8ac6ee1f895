"""Configuration of a GLA model (the keys of flash-linear-attention's ``GLAConfig``) and its per-layer geometry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from statex_dist.errors import CheckpointError, ConfigError
from statex_dist.models.fla import FLAConfig, head_geometry
from statex_dist.state.geometry import StateGeometry
from statex_dist.state.plan import LayerExpansion

GATE_LOW_RANK_DIM = 16
GATE_LOGIT_NORMALIZER = 16


@dataclass(kw_only=True)
class GLAConfig(FLAConfig):
    """Hyper-parameters of a GLA language model.

    ``expand_k`` and ``expand_v`` size keys and values relative to ``hidden_size``; ``gate_logit_normalizer`` divides
    the log-sigmoid gate (16 in the public models, which do not store it).
    """

    MODEL_TYPE: ClassVar[str] = "gla"
    OPS: ClassVar[tuple[str, ...]] = ("merge_heads", "mix_heads", "grow_state")
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
