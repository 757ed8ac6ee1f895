"""Delta-rule layers of a host: their configuration, and their tensors under the names of the host's files."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from statex_dist.errors import CheckpointError, ConfigError, shown
from statex_dist.models.config import Recurrence
from statex_dist.models.gated_deltanet.config import DeltaRuleConfig, GatedDeltaNetConfig
from statex_dist.models.hybrid.config import HybridConfig
from statex_dist.models.kda.config import KDAConfig
from statex_dist.models.layout import GAIN_NAME, Names, TensorSpec, expansion_tensors
from statex_dist.models.registry import Family
from statex_dist.models.row_mapping import (
    Constant,
    Distribution,
    LogUniform,
    Normal,
    RowMapping,
    head_mappings,
)
from statex_dist.state.plan import LayerExpansion

LayerTensors = dict[str, tuple[int, ...]]


@dataclass(kw_only=True)
class GatedDeltaLayers(GatedDeltaNetConfig):
    """Gated DeltaNet layers inside another model."""


@dataclass(kw_only=True)
class KimiDeltaLayers(KDAConfig):
    """Layers of Kimi Delta Attention inside another model."""


class DeltaHybrid(HybridConfig):
    """A host of delta-rule layers."""

    OPS: ClassVar[tuple[str, ...]] = ("mix_heads", "grow_features")
    RECURRENCE: ClassVar[Recurrence] = "delta_rule"
    LAYERS: ClassVar[type[DeltaRuleConfig]] = GatedDeltaLayers

    def __post_init__(self) -> None:
        if (activation := self.text.get("hidden_act")) not in (None, "silu", "swish"):
            raise CheckpointError(
                f"{self.MODEL_TYPE} config: hidden_act={shown(activation)} is not supported; allowed: 'silu', also "
                "called 'swish', which follows the convolutions of the delta-rule layers too"
            )
        super().__post_init__()

    def mixer_config(self, layer: int | None = None) -> Any:
        """Return the delta-rule layers' own configuration, with the whole plan or that of one layer alone."""
        fields = self.mixer_fields()
        values, keys = fields.pop("value_dim", None), fields["head_dim"]
        if values is not None:
            fields["expand_v"] = values / keys if keys else 1.0  # a size of 0 is refused by name
        names = ("vocab_size", "hidden_size", "num_hidden_layers", "initializer_range")
        return self.LAYERS(**{name: getattr(self, name) for name in names}, **fields, statex=self.plan_of(layer))

    def row_sizes(self, name: str) -> tuple[int, ...]:
        """Return the rows of the convolutions of queries, keys and values, which are one tensor in memory."""
        if not name.endswith(".conv1d.weight"):
            return ()
        layers = self.mixer_config()
        return layers.key_dim, layers.key_dim, layers.value_dim

    def why_not(self, op: str) -> str:
        """Explain why heads of a delta rule cannot be merged, nor their keys grown."""
        return self.mixer_config().replace(statex=None).why_not(op).replace(self.LAYERS.MODEL_TYPE, self.MODEL_TYPE)

    def check_expansion(self, expansion: LayerExpansion) -> None:
        """Raise if there are fewer heads than partners, or the plan would reset norms that are the host's."""
        self._check_head_factor(expansion, self.mixer_config().value_heads)
        if expansion.reset_dynamics:
            raise ConfigError(
                f"plan, layer {expansion.layer}: reset_dynamics also resets the norm before the layer, which is the "
                f"host's in a {self.MODEL_TYPE} model; leave it out"
            )


def projections(config: DeltaRuleConfig, form: str) -> LayerTensors:
    """Return shapes of a mixer's tensors by name without the mixer's.

    Args:
        config: The layers.
        form: ``fused`` (Qwen3-Next), ``split`` (Qwen3.5), ``separate`` (OLMo-hybrid) or ``kimi`` (Kimi-Linear).
    """
    hidden, keys, values, heads = config.hidden_size, config.key_dim, config.value_dim, config.value_heads
    inputs: LayerTensors
    conv: LayerTensors = {"conv1d.weight": (2 * keys + values, 1, config.conv_size)}
    norm, out = "norm.weight", "out_proj.weight"
    dynamics: LayerTensors = {"dt_bias": (heads,), "A_log": (heads,)}
    if form == "fused":
        inputs = {"in_proj_qkvz.weight": (2 * keys + 2 * values, hidden), "in_proj_ba.weight": (2 * heads, hidden)}
    elif form == "split":
        inputs = {"in_proj_qkv.weight": (2 * keys + values, hidden), "in_proj_z.weight": (values, hidden)}
        inputs |= {f"in_proj_{name}.weight": (heads, hidden) for name in "ba"}
    else:
        inputs = {f"{name}_proj.weight": (keys, hidden) for name in "qk"}
        inputs |= {"v_proj.weight": (values, hidden), "b_proj.weight": (heads, hidden)}
        if form == "separate":
            inputs |= {"g_proj.weight": (values, hidden), "a_proj.weight": (heads, hidden)}
        else:
            assert isinstance(config, KDAConfig)
            rank = config.head_value_dim
            inputs |= {f"{name}_a_proj.weight": (rank, hidden) for name in "fg"}
            inputs |= {"f_b_proj.weight": (config.gate_dim, rank), "g_b_proj.weight": (values, rank)}
            dynamics = {"dt_bias": (config.gate_dim,), "A_log": (1, 1, heads, 1)}
        conv = {
            f"{name}_conv1d.weight": (size, 1, config.conv_size)
            for name, size in {"q": keys, "k": keys, "v": values}.items()
        }
        norm, out = "o_norm.weight", "o_proj.weight"
    return {**dynamics, **conv, **inputs, norm: (config.head_value_dim,), out: (hidden, values)}


def layer_tensors(form: str, config: DeltaHybrid, layer: int) -> dict[str, TensorSpec]:
    """Return the mixer's tensors of one layer under the plan, by name without the layer's prefix."""
    place, layers = config.place(layer), config.mixer_config()
    specs = {
        f"{place}.{name}": TensorSpec(shape=shape, decay="proj" in name)
        for name, shape in projections(layers, form).items()
    }
    return {**specs, **expansion_tensors(layers.layer_geometry(layer), place)}


def first_value(suffix: str, shape: tuple[int, ...], *, config: DeltaHybrid) -> Distribution:
    """Return the distribution of a mixer's tensor (name without the layer's prefix)."""
    if suffix.endswith(".A_log"):
        return LogUniform(0.0, 16.0)
    if suffix.endswith(("norm.weight", ".dt_bias")):
        return Constant(1.0)
    if suffix.endswith(".mix"):
        return Constant(shape[1] ** -0.5)
    if suffix.endswith(GAIN_NAME):
        return Constant(0.0)
    return Normal(config.initializer_range)


def layer_mappings(
    form: str, config: DeltaHybrid, after: DeltaHybrid, expansion: LayerExpansion
) -> dict[str, RowMapping]:
    """Return a row mapping for each tensor of an expanded layer that changes or is new, by name without the prefix."""
    before, place = layer_tensors(form, config, expansion.layer), config.place(expansion.layer)
    norm = next(name for name in before if "norm" in name)
    return head_mappings(
        expansion,
        before,
        layer_tensors(form, after, expansion.layer),
        partial(first_value, config=config),
        num_heads=config.mixer_config().value_heads,
        mix=f"{place}.mix",
        redrawn_names=[name for name in before if not name.endswith(("norm.weight", "A_log", "dt_bias"))],
        norms=(norm, norm),
    )


def delta_host(config: type[DeltaHybrid], names: Names, *, form: str) -> Family:
    """Return the family of a host of delta-rule layers; ``form`` is that of :func:`projections`."""
    return Family(
        config=config,
        names=names,
        layer_tensors=partial(layer_tensors, form),
        first_value=first_value,
        layer_mappings=partial(layer_mappings, form),
        block=None,
    )


def gated_delta_keys(**changed: tuple[str, Any]) -> dict[str, tuple[str, Any]]:
    """Return the keys of transformers' Gated DeltaNet layers and their defaults, with ``changed`` ones."""
    return {
        "num_heads": ("linear_num_key_heads", 16),
        "num_v_heads": ("linear_num_value_heads", 32),
        "head_dim": ("linear_key_head_dim", 128),
        "value_dim": ("linear_value_head_dim", 128),
        "conv_size": ("linear_conv_kernel_dim", 4),
        "norm_eps": ("rms_norm_eps", 1e-6),
        **changed,
    }
