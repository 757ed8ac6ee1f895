"""The models of transformers that we run with delta-rule layers of our own: a row each (Mamba2: ``mamba2_hosts``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from statex_dist.errors import CheckpointError, shown
from statex_dist.models.config import is_layer
from statex_dist.models.gated_deltanet.config import DeltaRuleConfig
from statex_dist.models.hybrid.config import HostModel
from statex_dist.models.hybrid.delta import DeltaHybrid, KimiDeltaLayers, delta_host, gated_delta_keys
from statex_dist.models.hybrid.key_values import grouped, latent, whole
from statex_dist.models.hybrid.layer_lists import LayerKind, Values, every, listed
from statex_dist.models.hybrid.names import Joined, NameMap, Rename
from statex_dist.models.layout import Names

# Qwen3-Next: Gated DeltaNet, every fourth layer attention, experts in each.


def _qwen_kinds(values: Values, count: int) -> list[LayerKind]:
    return listed(values, count, "layer_types") or every(values, count, values.get("full_attention_interval") or 4)


QWEN_EXPERTS = (
    Joined(
        r"\.mlp\.experts\.gate_up_proj$",
        (".mlp.experts.{e}.gate_proj.weight", ".mlp.experts.{e}.up_proj.weight"),
    ),
    Joined(r"\.mlp\.experts\.down_proj$", (".mlp.experts.{e}.down_proj.weight",)),
)


class Qwen3NextConfig(DeltaHybrid):
    """A Qwen3-Next model."""

    MODEL_TYPE: ClassVar[str] = "qwen3_next"
    DEFAULTS: ClassVar[Mapping[str, Any]] = {"vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 48}
    HOST: ClassVar[HostModel] = HostModel(
        model="qwen3_next.modeling_qwen3_next:Qwen3NextModel",
        layer_kinds=_qwen_kinds,
        keys=gated_delta_keys(),
        mixer="HostedGatedDelta",
        place="linear_attn",
        cached=grouped(16, 2, 256),
        names=NameMap(joined=QWEN_EXPERTS),
    )


QWEN3_NEXT = delta_host(
    Qwen3NextConfig, Names(trunk="model", final_norm="norm", embedding="embed_tokens"), form="fused"
)


# Qwen3.5 (text): Gated DeltaNet with projections of their own; in a multimodal model it is one part of several.

_QWEN3_5 = {"vocab_size": 248320, "hidden_size": 4096, "num_hidden_layers": 32}
_QWEN3_5_MOE = {"vocab_size": 248320, "hidden_size": 2048, "num_hidden_layers": 40}
_TEXT_NAMES = Names(trunk="model", final_norm="norm", embedding="embed_tokens")
_MULTIMODAL_NAMES = Names(trunk="model.language_model", final_norm="norm", embedding="embed_tokens")
_LANGUAGE_MODEL = Rename(r"^model\.(?!language_model\.|visual\.)", "model.language_model.")


def _qwen3_5(model: str, names: NameMap, *, key_values: int, text: str | None = None) -> HostModel:
    return HostModel(
        model=model,
        layer_kinds=_qwen_kinds,
        keys=gated_delta_keys(),
        mixer="hybrid.delta_mixers:HostedSplitGatedDelta",
        place="linear_attn",
        cached=grouped(16, key_values, 256),
        text=text,
        names=names,
    )


class Qwen35TextConfig(DeltaHybrid):
    """The text model of a Qwen3.5 by itself."""

    MODEL_TYPE: ClassVar[str] = "qwen3_5_text"
    DEFAULTS: ClassVar[Mapping[str, Any]] = _QWEN3_5
    HOST: ClassVar[HostModel] = _qwen3_5("qwen3_5.modeling_qwen3_5:Qwen3_5TextModel", NameMap(), key_values=4)


class Qwen35Config(DeltaHybrid):
    """A multimodal Qwen3.5, whose text model is run."""

    MODEL_TYPE: ClassVar[str] = "qwen3_5"
    DEFAULTS: ClassVar[Mapping[str, Any]] = _QWEN3_5
    HOST: ClassVar[HostModel] = _qwen3_5(
        "qwen3_5.modeling_qwen3_5:Qwen3_5TextModel",
        NameMap(renames=(_LANGUAGE_MODEL,)),
        key_values=4,
        text="text_config",
    )


class Qwen35MoeTextConfig(DeltaHybrid):
    """The text model of a Qwen3.5 with experts, by itself."""

    MODEL_TYPE: ClassVar[str] = "qwen3_5_moe_text"
    DEFAULTS: ClassVar[Mapping[str, Any]] = _QWEN3_5_MOE
    HOST: ClassVar[HostModel] = _qwen3_5(
        "qwen3_5_moe.modeling_qwen3_5_moe:Qwen3_5MoeTextModel", NameMap(joined=QWEN_EXPERTS), key_values=2
    )


class Qwen35MoeConfig(DeltaHybrid):
    """A multimodal Qwen3.5 with experts, whose text model is run."""

    MODEL_TYPE: ClassVar[str] = "qwen3_5_moe"
    DEFAULTS: ClassVar[Mapping[str, Any]] = _QWEN3_5_MOE
    HOST: ClassVar[HostModel] = _qwen3_5(
        "qwen3_5_moe.modeling_qwen3_5_moe:Qwen3_5MoeTextModel",
        NameMap(joined=QWEN_EXPERTS, renames=(_LANGUAGE_MODEL,)),
        key_values=2,
        text="text_config",
    )


QWEN3_5_TEXT = delta_host(Qwen35TextConfig, _TEXT_NAMES, form="split")
QWEN3_5 = delta_host(Qwen35Config, _MULTIMODAL_NAMES, form="split")
QWEN3_5_MOE_TEXT = delta_host(Qwen35MoeTextConfig, _TEXT_NAMES, form="split")
QWEN3_5_MOE = delta_host(Qwen35MoeConfig, _MULTIMODAL_NAMES, form="split")


# OLMo-hybrid: Gated DeltaNet with strengths up to 2, under flash-linear-attention's names.

_CONVOLUTIONS = Joined(
    r"\.conv1d\.weight$", (".q_conv1d.weight", ".k_conv1d.weight", ".v_conv1d.weight"), stacked=False
)


def _olmo_kinds(values: Values, count: int) -> list[LayerKind]:
    if found := listed(values, count, "layer_types"):
        return found
    kinds = every(values, count, 4)
    return kinds if count == 0 or "attention" in kinds else [*kinds[:-1], "attention"]


def _olmo_options(values: Values) -> dict[str, Any]:
    heads = whole(values, "num_attention_heads", 30)
    keys = whole(values, "linear_num_key_heads", heads)
    size = whole(values, "linear_key_head_dim", int(0.75 * whole(values, "hidden_size", 3840) / keys))
    return {
        "num_heads": keys,
        "num_v_heads": whole(values, "linear_num_value_heads", heads),
        "head_dim": size,
        "value_dim": whole(values, "linear_value_head_dim", 2 * size),
        "norm_eps": 1e-5,  # of the norm behind the recurrence alone, whatever rms_norm_eps says
    }


class OlmoHybridConfig(DeltaHybrid):
    """An OLMo-hybrid model."""

    MODEL_TYPE: ClassVar[str] = "olmo_hybrid"
    DEFAULTS: ClassVar[Mapping[str, Any]] = {"vocab_size": 100352, "hidden_size": 3840, "num_hidden_layers": 32}
    HOST: ClassVar[HostModel] = HostModel(
        model="olmo_hybrid.modeling_olmo_hybrid:OlmoHybridModel",
        layer_kinds=_olmo_kinds,
        keys={
            "conv_size": ("linear_conv_kernel_dim", 4),
            "allow_neg_eigval": ("linear_allow_neg_eigval", True),
        },
        options=_olmo_options,
        mixer="hybrid.delta_mixers:HostedSeparateGatedDelta",
        place="linear_attn",
        cached=grouped(30, None),
        names=NameMap(
            joined=(_CONVOLUTIONS,),
            renames=(
                Rename(r"\.input_layernorm\.", ".attention_layer_norm."),
                Rename(r"\.post_attention_layernorm\.", ".feedforward_layer_norm."),
            ),
        ),
    )


OLMO_HYBRID = delta_host(OlmoHybridConfig, _TEXT_NAMES, form="separate")


# Kimi-Linear (arXiv 2510.26692): Kimi Delta Attention, latent attention without positions, experts.

_KIMI_LAYERS = "linear_attn_config"


def _kimi_section(values: Values) -> Values:
    section = values.get(_KIMI_LAYERS)
    if not isinstance(section, dict | None):
        raise CheckpointError(f"config.json: '{_KIMI_LAYERS}' must be a mapping, not {shown(section)}")
    return section or {}


def _kimi_kinds(values: Values, count: int) -> list[LayerKind]:
    if found := listed(values, count, "layer_types"):
        return found
    section = _kimi_section(values)
    of_kind: dict[LayerKind, Any] = {"attention": section.get("full_attn_layers")}
    of_kind["recurrent"] = section.get("kda_layers")
    if None in of_kind.values():
        return ["attention" if layer and layer % 4 == 0 else "recurrent" for layer in range(count)]
    kinds: dict[int, LayerKind] = {}
    for kind, numbers in of_kind.items():
        for number in numbers if isinstance(numbers, list) else [numbers]:
            if not is_layer(number, count + 1) or number == 0 or number - 1 in kinds:
                raise CheckpointError(
                    f"config.json: {_KIMI_LAYERS} must name each of layers 1 to {count} once in full_attn_layers or "
                    f"kda_layers, not {shown(number)}"
                )
            kinds[number - 1] = kind
    if len(kinds) != count:
        raise CheckpointError(f"config.json: {_KIMI_LAYERS} names {len(kinds)} of {count} layers")
    return [kinds[layer] for layer in range(count)]


def _kimi_options(values: Values) -> dict[str, Any]:
    section = _kimi_section(values)
    keys = {"num_heads": "num_heads", "head_dim": "head_dim", "conv_size": "short_conv_kernel_size"}
    return {name: whole(section, key, 1) for name, key in keys.items() if section.get(key) is not None}


class KimiLinearConfig(DeltaHybrid):
    """A Kimi-Linear model."""

    MODEL_TYPE: ClassVar[str] = "kimi_linear"
    LAYERS: ClassVar[type[DeltaRuleConfig]] = KimiDeltaLayers
    DEFAULTS: ClassVar[Mapping[str, Any]] = {"vocab_size": 163840, "hidden_size": 2304, "num_hidden_layers": 27}
    HOST: ClassVar[HostModel] = HostModel(
        model="kimi_linear.modeling_kimi_linear:KimiLinearModel",
        layer_kinds=_kimi_kinds,
        keys={
            "num_heads": ("linear_num_heads", 32),
            "head_dim": ("linear_head_dim", 128),
            "conv_size": ("linear_conv_kernel_dim", 4),
            "norm_eps": ("rms_norm_eps", 1e-5),
        },
        options=_kimi_options,
        mixer="hybrid.delta_mixers:HostedKimiDelta",
        place="self_attn",
        cached=latent,
        names=NameMap(
            joined=(
                _CONVOLUTIONS,
                Joined(
                    r"\.mlp\.experts\.gate_up_proj$",
                    (".block_sparse_moe.experts.{e}.w1.weight", ".block_sparse_moe.experts.{e}.w3.weight"),
                ),
                Joined(r"\.mlp\.experts\.down_proj$", (".block_sparse_moe.experts.{e}.w2.weight",)),
            ),
            renames=(
                Rename(r"\.self_attn\.forget_gate\.", ".self_attn."),
                Rename(r"\.mlp\.(gate|shared_experts)\.", r".block_sparse_moe.\1."),
                # Dense layers have the hub's name; transformers' own saving gives them the experts' name.
                Rename(r"\.block_sparse_moe\.(gate|up|down)_proj\.", r".mlp.\1_proj."),
            ),
        ),
    )


KIMI_LINEAR = delta_host(KimiLinearConfig, _TEXT_NAMES, form="kimi")
