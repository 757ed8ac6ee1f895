"""A toy model: linear attention whose heads forget at a learned rate. Configuration, tensors, values, expansion."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from statex_dist.models import fla
from statex_dist.models.fla import MIX_NAME, FLAConfig, block_tensors, head_geometry
from statex_dist.models.layout import TensorSpec, expansion_tensors, layer_units
from statex_dist.models.registry import Family
from statex_dist.models.row_mapping import Constant, Distribution, RowMapping, head_mappings
from statex_dist.state.geometry import StateGeometry
from statex_dist.state.plan import LayerExpansion


@dataclass(kw_only=True)
class ToyConfig(FLAConfig):
    MODEL_TYPE: ClassVar[str] = "toy"
    OPS: ClassVar[tuple[str, ...]] = ("merge_heads", "mix_heads")

    num_heads: int

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("num_heads")
        self.check_plan()

    def check_expansion(self, expansion: LayerExpansion) -> None:
        self._check_head_factor(expansion, self.num_heads)

    def layer_geometry(self, layer: int) -> StateGeometry:
        expansion = self.statex.get(layer) if self.statex else None
        return head_geometry(
            expansion, num_heads=self.num_heads, keys=self.hidden_size, values=self.hidden_size, conv_kernel=4
        )


def layer_tensors(config: ToyConfig, layer: int) -> dict[str, TensorSpec]:
    hidden, geometry = config.hidden_size, config.layer_geometry(layer)
    units = layer_units(geometry)
    specs = {
        "attn.rate": TensorSpec(shape=(hidden,), decay=False, units=(units.keys,)),
        **expansion_tensors(geometry, "attn"),
    }
    for name, cut in (("q", units.keys), ("k", units.keys), ("v", units.values)):
        specs[f"attn.{name}_proj.weight"] = TensorSpec(shape=(hidden, hidden), units=(cut,))
    specs["attn.conv.weight"] = TensorSpec(shape=(hidden, 1, 4), decay=False, units=(units.keys,))
    specs["attn.o_proj.weight"] = TensorSpec(shape=(hidden, hidden), axis=1, units=(units.values,))
    return block_tensors(config, specs)


def first_value(suffix: str, shape: tuple[int, ...], *, config: ToyConfig) -> Distribution:
    return Constant(1.0) if suffix == "attn.rate" else fla.first_value(suffix, shape, config=config)


def layer_mappings(before: ToyConfig, after: ToyConfig, expansion: LayerExpansion) -> dict[str, RowMapping]:
    old, new = layer_tensors(before, expansion.layer), layer_tensors(after, expansion.layer)
    return head_mappings(
        expansion,
        old,
        new,
        partial(first_value, config=before),
        num_heads=before.num_heads,
        mix=MIX_NAME,
        redrawn_names=[name for name in old if name.endswith("_proj.weight") and name.startswith("attn.")],
        norms=("attn_norm.weight", "mlp_norm.weight"),
    )


FAMILY = Family(
    config=ToyConfig,
    names=fla.NAMES,
    layer_tensors=layer_tensors,
    first_value=first_value,
    layer_mappings=layer_mappings,
    block="tests.models.toy.mixer:ToyBlock",
)
