"""A KDA model: configuration (the keys of flash-linear-attention's ``KDAConfig``), tensors, first values, expansion."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from statex_dist.errors import CheckpointError
from statex_dist.models import fla
from statex_dist.models.fla import block_tensors
from statex_dist.models.gated_deltanet.config import DeltaRuleConfig, conv_tensors, mixing_mappings
from statex_dist.models.layout import TensorSpec, expansion_tensors, layer_units
from statex_dist.models.registry import Family
from statex_dist.models.row_mapping import Constant, Distribution, LogUniform, TimeStep


@dataclass(kw_only=True)
class KDAConfig(DeltaRuleConfig):
    """Hyper-parameters of a KDA language model; ``lower_bound`` bounds the log decays (with ``safe_gate``)."""

    MODEL_TYPE: ClassVar[str] = "kda"

    num_heads: int = 16
    head_dim: int = 128
    expand_v: float = 1.0
    safe_gate: bool = False
    lower_bound: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.safe_gate and self.lower_bound is None:
            raise CheckpointError("kda config: safe_gate needs a lower_bound")

    @property
    def gate_dim(self) -> int:
        """Decays of all value heads together: one per key channel."""
        return self.value_heads * self.head_dim


def layer_tensors(config: KDAConfig, layer: int) -> dict[str, TensorSpec]:
    """Return the tensors of one layer under the plan, by name without the layer's prefix."""
    hidden, keys, values, heads = config.hidden_size, config.key_dim, config.value_dim, config.value_heads
    rank, geometry = config.head_value_dim, config.layer_geometry(layer)
    units = layer_units(geometry)
    by_key, by_head, by_value = (units.keys,), (units.heads,), (units.values,)
    specs = {
        "attn.A_log": TensorSpec(shape=(heads,), decay=False, units=by_head),
        **expansion_tensors(geometry, "attn"),
        "attn.dt_bias": TensorSpec(shape=(config.gate_dim,), decay=False, units=by_head),
        "attn.q_proj.weight": TensorSpec(shape=(keys, hidden), units=by_key),
        "attn.k_proj.weight": TensorSpec(shape=(keys, hidden), units=by_key),
        "attn.v_proj.weight": TensorSpec(shape=(values, hidden), units=by_value),
        "attn.b_proj.weight": TensorSpec(shape=(heads, hidden), units=by_head),
        **conv_tensors(config, units),
        "attn.o_proj.weight": TensorSpec(shape=(hidden, values), axis=1, units=by_value),
        "attn.f_proj.0.weight": TensorSpec(shape=(rank, hidden)),
        "attn.f_proj.1.weight": TensorSpec(shape=(config.gate_dim, rank), units=by_head),
        "attn.g_proj.0.weight": TensorSpec(shape=(rank, hidden)),
        "attn.g_proj.1.weight": TensorSpec(shape=(values, rank), units=by_value),
        "attn.g_proj.1.bias": TensorSpec(shape=(values,), decay=False, units=by_value),
        "attn.o_norm.weight": TensorSpec(shape=(rank,), decay=False, units=(units.norm,)),
    }
    return block_tensors(config, specs)


def first_value(suffix: str, shape: tuple[int, ...], *, config: KDAConfig) -> Distribution:
    """Return the distribution of the tensor ``suffix`` (name without the layer's prefix)."""
    if suffix == "attn.A_log":
        return Constant(0.0) if config.safe_gate else LogUniform(1.0, 16.0)
    if suffix == "attn.dt_bias":
        return TimeStep(0.001, 0.1, 1e-4)
    return fla.first_value(suffix, shape, config=config)


FAMILY = Family(
    config=KDAConfig,
    names=fla.NAMES,
    layer_tensors=layer_tensors,
    first_value=first_value,
    layer_mappings=partial(mixing_mappings, layer_tensors, first_value),
    block="statex_dist.models.kda.mixer:KDABlock",
)
