"""An HGRN2 model: configuration (the keys of flash-linear-attention's ``HGRN2Config``), tensors, expansion.

The output norm runs over all heads together, so merging heads changes no tensor at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from statex_dist.errors import CheckpointError
from statex_dist.models import fla
from statex_dist.models.fla import MIX_NAME, FLAConfig, block_tensors, head_geometry
from statex_dist.models.layout import TensorSpec, expansion_tensors, layer_units
from statex_dist.models.registry import Family
from statex_dist.models.row_mapping import RowMapping, head_mappings
from statex_dist.state.geometry import StateGeometry
from statex_dist.state.plan import LayerExpansion

LOWER_BOUNDS = f"{fla.NAMES.trunk}.lower_bounds"


@dataclass(kw_only=True)
class HGRN2Config(FLAConfig):
    """Hyper-parameters of an HGRN2 language model.

    ``expand_ratio`` is the number of key channels of a head; where it is null, ``num_heads`` decides.
    """

    MODEL_TYPE: ClassVar[str] = "hgrn2"
    OPS: ClassVar[tuple[str, ...]] = ("merge_heads", "mix_heads", "grow_features")
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


def shared_tensors(config: HGRN2Config) -> dict[str, TensorSpec]:
    """Return what the layers share: the logits of their gates' lower bounds, ``[num_layers, hidden]``.

    Tensor-parallel ranks all hold them whole: layers with merged heads need other columns than those without.
    """
    if not config.use_lower_bound:
        return {}
    return {LOWER_BOUNDS: TensorSpec(shape=(config.num_hidden_layers, config.hidden_size), decay=False, trunk=False)}


def layer_tensors(config: HGRN2Config, layer: int) -> dict[str, TensorSpec]:
    """Return the tensors of one layer under the plan, by name without the layer's prefix."""
    hidden, geometry = config.hidden_size, config.layer_geometry(layer)
    units = layer_units(geometry)
    cuts = {"q": (units.keys,), "f": (units.keys,), "i": (units.values,)}
    specs = expansion_tensors(geometry, "attn")
    for name, cut in cuts.items():
        specs[f"attn.{name}_proj.weight"] = TensorSpec(shape=(hidden, hidden), units=cut)
    if config.use_short_conv:
        for name, cut in cuts.items():
            specs[f"attn.{name}_conv1d.weight"] = TensorSpec(
                shape=(hidden, 1, config.conv_size), decay=False, units=cut
            )
    specs["attn.g_norm.weight"] = TensorSpec(shape=(hidden,), decay=False, units=(units.values,))
    specs["attn.o_proj.weight"] = TensorSpec(shape=(hidden, hidden), axis=1, units=(units.values,))
    return block_tensors(config, specs)


def layer_mappings(config: HGRN2Config, after: HGRN2Config, expansion: LayerExpansion) -> dict[str, RowMapping]:
    """Return a row mapping for each tensor of an expanded layer that changes or is new, by name without the prefix."""
    before = layer_tensors(config, expansion.layer)
    return head_mappings(
        expansion,
        before,
        layer_tensors(after, expansion.layer),
        partial(fla.first_value, config=config),
        num_heads=config.heads,
        mix=MIX_NAME,
        redrawn_names=[name for name in before if name.startswith("attn.") and "norm" not in name],
        norms=("attn_norm.weight", "attn.g_norm.weight"),
    )


FAMILY = Family(
    config=HGRN2Config,
    names=fla.NAMES,
    layer_tensors=layer_tensors,
    first_value=fla.first_value,
    layer_mappings=layer_mappings,
    shared_tensors=shared_tensors,
    block="statex_dist.models.hgrn2.mixer:HGRN2Block",
)
