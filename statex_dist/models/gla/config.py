"""Configuration of a GLA model (the keys of flash-linear-attention's ``GLAConfig``) and its per-layer geometry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from statex_dist.errors import CheckpointError, ConfigError
from statex_dist.models.config import ModelConfig
from statex_dist.state.geometry import StateGeometry

GATE_LOW_RANK_DIM = 16
GATE_LOGIT_NORMALIZER = 16


@dataclass(kw_only=True)
class GLAConfig(ModelConfig):
    """Hyper-parameters of a GLA language model.

    ``expand_k`` and ``expand_v`` size keys and values relative to ``hidden_size``; ``gate_logit_normalizer`` divides
    the log-sigmoid gate (16 in the public models, which do not store it).
    """

    MODEL_TYPE: ClassVar[str] = "gla"

    num_heads: int
    expand_k: float = 0.5
    expand_v: float = 1.0
    hidden_ratio: int | None = 4
    intermediate_size: int | None = None
    num_kv_heads: int | None = None
    feature_map: str | None = None
    use_short_conv: bool = False
    conv_size: int = 4
    use_output_gate: bool = True
    clamp_min: float | None = None
    hidden_act: str = "swish"
    norm_eps: float = 1e-6
    fuse_norm: bool = True
    attn: dict | None = None
    gate_logit_normalizer: int = GATE_LOGIT_NORMALIZER

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("num_heads", "conv_size", "gate_logit_normalizer", "intermediate_size", "hidden_ratio")
        for name, given, allowed in (
            ("num_kv_heads", self.num_kv_heads, (None, self.num_heads)),
            ("feature_map", self.feature_map, (None,)),
            ("hidden_act", self.hidden_act, ("swish",)),
            ("use_output_gate", self.use_output_gate, (True,)),
            ("attn", self.attn, (None,)),
        ):
            if given not in allowed:
                raise CheckpointError(f"gla config: {name}={given!r} is not supported; allowed: {allowed}")
        if any(size < 1 or size % self.num_heads for size in (self.key_dim, self.value_dim)):
            raise CheckpointError(
                f"gla config: num_heads={self.num_heads} must divide the key size {self.key_dim} "
                f"and the value size {self.value_dim}"
            )
        self.check_plan()
        for expansion in self.statex.layers if self.statex else ():
            if expansion.op not in ("merge_heads", "mix_heads"):
                raise ConfigError(
                    f"plan, layer {expansion.layer}: op {expansion.op} does not apply to gla; "
                    "use merge_heads or mix_heads"
                )
            if expansion.op == "merge_heads" and self.num_heads % expansion.factor:
                raise ConfigError(
                    f"plan, layer {expansion.layer}: {self.num_heads} heads do not divide into groups of "
                    f"{expansion.factor}; the factor must divide num_heads={self.num_heads}"
                )
            if expansion.factor > self.num_heads:
                raise ConfigError(
                    f"plan, layer {expansion.layer}: factor {expansion.factor} is larger than num_heads="
                    f"{self.num_heads}; a gla layer grows at most by its number of heads"
                )

    @property
    def key_dim(self) -> int:
        """Key channels of all heads together."""
        return int(self.hidden_size * self.expand_k)

    @property
    def value_dim(self) -> int:
        """Value channels of all heads together."""
        return int(self.hidden_size * self.expand_v)

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

    def layer_geometry(self, layer: int) -> StateGeometry:
        """Return the state of ``layer`` under the plan."""
        heads, values_per_key = self.num_heads, 1
        if expansion := self.statex.get(layer) if self.statex else None:
            if expansion.op == "merge_heads":
                heads //= expansion.factor
            else:
                values_per_key = expansion.factor
        return StateGeometry(
            num_heads=heads,
            key_dim=self.key_dim // heads,
            value_dim=self.value_dim // heads,
            num_key_groups=heads,
            values_per_key=values_per_key,
            conv_channels=2 * self.key_dim + self.value_dim if self.use_short_conv else 0,
            conv_kernel=self.conv_size if self.use_short_conv else 0,
        )
