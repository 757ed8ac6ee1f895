"""Mamba2 layers of a host: their configuration, tensors and expansion, which are Mamba2's under the host's names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from statex_dist.models.config import ModelConfig, Recurrence
from statex_dist.models.hybrid.config import HybridConfig
from statex_dist.models.layout import Names, TensorSpec
from statex_dist.models.mamba2 import tensors as mamba2
from statex_dist.models.mamba2.config import Mamba2Config
from statex_dist.models.registry import Family
from statex_dist.models.row_mapping import Distribution, RowMapping
from statex_dist.state.plan import LayerExpansion


@dataclass(kw_only=True)
class Mamba2Layers(Mamba2Config):
    """Mamba2 layers inside another model: the inner size is that of the heads, whatever the model's width.

    Attributes:
        gated_norm: Whether there is one; without it the gate multiplies the scan's output.
        norm_before_gate: Whether it comes before the gate.
        out_bias: Whether the output projection has a bias.
        in_factor: Factor of the mixer's input.
        row_factors: Factors of ``z | x | B | C | dt``, or none.
    """

    gated_norm: bool = True
    norm_before_gate: bool = False
    out_bias: bool = False
    in_factor: float = 1.0
    row_factors: tuple[float, ...] = ()

    @property
    def inner_size(self) -> int:
        """Channels of ``x`` and ``z``."""
        return self.num_heads * self.head_dim

    def check_plan(self) -> None:
        """Leave the check to the host's configuration, which does it once and not for each layer."""


class Mamba2Hybrid(HybridConfig):
    """A host of Mamba2 layers."""

    OPS: ClassVar[tuple[str, ...]] = ("grow_state", "grow_features")
    RECURRENCE: ClassVar[Recurrence] = "ssd"

    def mixer_config(self, layer: int | None = None) -> Mamba2Layers:
        """Return the Mamba2 layers' own configuration, with the whole plan or that of one layer alone."""
        fields = {**_of_model(self), "tie_word_embeddings": False, **self.mixer_fields()}
        fields.setdefault("out_bias", fields["use_bias"])
        return Mamba2Layers(**fields, statex=self.plan_of(layer))

    def plain_keys(self) -> dict[str, Any]:
        """Return the grown ``d_state`` under the host's key where every Mamba2 layer grows by the same factor."""
        factor = self.common_factor()
        key = self.HOST.keys["state_size"][0]
        return {key: self.mixer_fields()["state_size"] * factor} if factor else {}

    def with_plan(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return the contents of a ``config.json`` with this plan written in and all other keys as they are."""
        if self.plain_keys():  # a base that leaves the key to its default
            values = {self.HOST.keys["state_size"][0]: self.mixer_fields()["state_size"], **values}
        return super().with_plan(values)


def _of_model(config: ModelConfig) -> dict[str, Any]:
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "initializer_range")
    return {name: getattr(config, name) for name in names}


def _host_names(config: HybridConfig, layer: int, suffixes: dict[str, Any]) -> dict[str, Any]:
    """Return entries of the mixer by the host's names; those outside the mixer are the host's own."""
    place = config.place(layer)
    without = () if config.mixer_config().gated_norm else ("mixer.norm.weight",)
    return {
        name.replace("mixer", place, 1): value
        for name, value in suffixes.items()
        if name.startswith("mixer.") and name not in without
    }


def layer_tensors(config: Mamba2Hybrid, layer: int) -> dict[str, TensorSpec]:
    """Return the mixer's tensors of one layer under the plan, by name without the layer's prefix."""
    layers = config.mixer_config(layer)
    specs = mamba2.layer_tensors(layers, layer)
    specs.pop("mixer.out_proj.bias", None)
    if layers.out_bias:
        specs["mixer.out_proj.bias"] = TensorSpec(shape=(config.hidden_size,), decay=False)
    return _host_names(config, layer, specs)


def first_value(suffix: str, shape: tuple[int, ...], *, config: Mamba2Hybrid) -> Distribution:
    """Return the distribution of a mixer's tensor (name without the layer's prefix)."""
    place = next(place for place in config.places if suffix.startswith(f"{place}."))
    return mamba2.first_value(suffix.replace(place, "mixer", 1), shape, config=config.mixer_config())


def layer_mappings(config: Mamba2Hybrid, after: Mamba2Hybrid, expansion: LayerExpansion) -> dict[str, RowMapping]:
    """Return a row mapping for each tensor of an expanded layer that changes, by name without the prefix."""
    layer = expansion.layer
    mappings = mamba2.layer_mappings(config.mixer_config(layer), after.mixer_config(layer), expansion)
    return _host_names(config, expansion.layer, mappings)


def mamba2_host(config: type[Mamba2Hybrid], names: Names) -> Family:
    """Return the family of a host of Mamba2 layers."""
    return Family(
        config=config,
        names=names,
        layer_tensors=layer_tensors,
        first_value=first_value,
        layer_mappings=layer_mappings,
        block=None,
    )
