"""Configuration of an HGRN2 model (the keys of flash-linear-attention's ``HGRN2Config``) and its geometry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from statex_dist.errors import CheckpointError
from statex_dist.models.fla import FLAConfig, head_geometry
from statex_dist.state.geometry import StateGeometry
from statex_dist.state.plan import LayerExpansion


@dataclass(kw_only=True)
class HGRN2Config(FLAConfig):
    """Hyper-parameters of an HGRN2 language model.

    ``expand_ratio`` is the number of key channels of a head; where it is null, ``num_heads`` decides.
    """

    MODEL_TYPE: ClassVar[str] = "hgrn2"
    OPS: ClassVar[tuple[str, ...]] = ("merge_heads", "mix_heads")
    FIXED: ClassVar[Mapping[str, tuple[Any, ...]]] = {**FLAConfig.FIXED, "elementwise_affine": (True,)}

    num_heads: int | None = None
    expand_ratio: int | None = 128
    use_short_conv: bool = False
    conv_size: int = 4
    use_lower_bound: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("num_heads", "expand_ratio", "conv_size")
        if self.expand_ratio is None and self.num_heads is None:
            raise CheckpointError("hgrn2 config: one of expand_ratio and num_heads must be given")
        if not self.heads or self.hidden_size % self.heads or self.heads * self.key_dim != self.hidden_size:
            raise CheckpointError(
                f"hgrn2 config: expand_ratio={self.expand_ratio} and num_heads={self.num_heads} do not divide "
                f"hidden_size={self.hidden_size}"
            )
        self.check_plan()

    def why_not(self, op: str) -> str:
        """Explain the one operation of GLA's that HGRN2 lacks."""
        if op == "grow_state":
            return (
                "op grow_state does not apply to hgrn2: the layers share their lower bounds, one per key channel, "
                "so no layer can have more channels than another"
            )
        return super().why_not(op)

    def check_expansion(self, expansion: LayerExpansion) -> None:
        """Raise if heads do not divide."""
        self._check_head_factor(expansion, self.heads)

    @property
    def heads(self) -> int:
        """Heads of a layer before any expansion."""
        if self.expand_ratio is not None:
            return self.hidden_size // self.expand_ratio
        return self.num_heads or 0

    @property
    def key_dim(self) -> int:
        """Key channels of a head before any expansion."""
        return self.expand_ratio or self.hidden_size // self.heads

    def layer_geometry(self, layer: int) -> StateGeometry:
        """Return the state of ``layer`` under the plan."""
        return head_geometry(
            self.statex.get(layer) if self.statex else None,
            num_heads=self.heads,
            keys=self.hidden_size,
            values=self.hidden_size,
            conv_kernel=self.conv_size if self.use_short_conv else 0,
        )
