"""The models of transformers that we run with Mamba2 layers of our own: a row each.

Steps: a host limits dt in its path over whole sequences alone, and not where it decodes token by token. We limit them
as that path does, everywhere: to ``time_step_limit``, in Nemotron-H and Zamba2 to ``time_step_min`` and above. So
decoding equals reading the whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from statex_dist.errors import CheckpointError, shown
from statex_dist.models.hybrid.config import HostModel
from statex_dist.models.hybrid.key_values import grouped
from statex_dist.models.hybrid.layer_lists import KINDS, LayerKind, Values, listed
from statex_dist.models.hybrid.mamba2 import Mamba2Hybrid, mamba2_host
from statex_dist.models.hybrid.names import Joined, NameMap, Rename
from statex_dist.models.layout import Names

_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SILU = ("silu", "swish")


def _keys(**changed: tuple[str, Any]) -> dict[str, tuple[str, Any]]:
    """Return the keys of Mamba2 layers in most models and their defaults, with ``changed`` ones."""
    return {
        "num_heads": ("mamba_n_heads", 128),
        "state_size": ("mamba_d_state", 256),
        "n_groups": ("mamba_n_groups", 1),
        "conv_kernel": ("mamba_d_conv", 4),
        "use_bias": ("mamba_proj_bias", False),
        "use_conv_bias": ("mamba_conv_bias", True),
        "layer_norm_epsilon": ("rms_norm_eps", 1e-5),
        "time_step_limit": ("time_step_limit", (0.0, math.inf)),
        **changed,
    }


def _head_dim(values: Values, inner: int, heads: int) -> int:
    """Return the size of a head where ``heads`` share ``inner`` channels; it may be given, or ``auto``."""
    size = values.get("mamba_d_head", "auto")
    size = inner // heads if size == "auto" else size
    if not isinstance(size, int) or size * heads != inner:
        raise CheckpointError(
            f"config.json: {shown(heads)} heads of {shown(size)} channels are not the {shown(inner)} channels of the "
            "Mamba2 layers"
        )
    return size


def _expanded_heads(values: Values) -> dict[str, Any]:
    """Return the head size of a model whose inner size is a multiple of its width."""
    inner = values.get("mamba_expand", 2) * values["hidden_size"]
    return {"head_dim": _head_dim(values, inner, values.get("mamba_n_heads", 128))}


_HEAD_TYPES: dict[str, Any] = {"mamba_expand": int, "mamba_d_head": int | str}

# Bamba (IBM, Princeton, UIUC): Mamba2 with a few attention layers.


def _bamba_kinds(values: Values, count: int) -> list[LayerKind]:
    attention = values.get("attn_layer_indices") or ()
    if outside := [layer for layer in attention if not 0 <= layer < count]:
        raise CheckpointError(
            f"bamba config: attn_layer_indices names layer {shown(outside[0])}; the model has layers 0..{count - 1}"
        )
    chosen = frozenset(attention)
    return ["attention" if layer in chosen else "recurrent" for layer in range(count)]


class BambaConfig(Mamba2Hybrid):
    """A Bamba model."""

    MODEL_TYPE: ClassVar[str] = "bamba"
    DEFAULTS: ClassVar[Mapping[str, Any]] = {
        **{"vocab_size": 128000, "hidden_size": 4096, "num_hidden_layers": 32},
        **_TOKENS,
    }
    HOST: ClassVar[HostModel] = HostModel(
        model="bamba.modeling_bamba:BambaModel",
        layer_kinds=_bamba_kinds,
        keys=_keys(),
        options=_expanded_heads,
        mixer="HostedMamba2",
        place="mamba",
        cached=grouped(32, 8),
        read={**_HEAD_TYPES, "attn_layer_indices": list[int] | None},
        fixed={"hidden_act": _SILU},
        training=frozenset({"z_loss_coefficient"}),
    )


BAMBA = mamba2_host(BambaConfig, Names(trunk="model", final_norm="final_layernorm", embedding="embed_tokens"))

# Granite 4.0-H (IBM): Mamba2 with a few attention layers; experts, or one MLP.

_GRANITE_KINDS = {name: KINDS[name] for name in ("linear_attention", "mamba", "full_attention", "attention")}


def _granite_kinds(values: Values, count: int) -> list[LayerKind]:
    found = listed(values, count, "layer_types", "layers_block_type", kinds=_GRANITE_KINDS)
    return ["recurrent"] * count if found is None else found


def _granite_head(values: Values) -> float:
    divisor = values.get("logits_scaling", 1.0)
    if not divisor > 0:
        raise CheckpointError(f"granitemoehybrid config: logits_scaling must be above 0, not {shown(divisor)}")
    return 1.0 / float(divisor)


class GraniteHConfig(Mamba2Hybrid):
    """A Granite 4.0-H model."""

    MODEL_TYPE: ClassVar[str] = "granitemoehybrid"
    DEFAULTS: ClassVar[Mapping[str, Any]] = {
        **{"vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32},
        **{"bos_token_id": 1, "eos_token_id": 2},
    }
    HOST: ClassVar[HostModel] = HostModel(
        model="granitemoehybrid.modeling_granitemoehybrid:GraniteMoeHybridModel",
        layer_kinds=_granite_kinds,
        keys=_keys(layer_norm_epsilon=("rms_norm_eps", 1e-6)),
        options=_expanded_heads,
        mixer="HostedMamba2",
        place="mamba",
        cached=grouped(32, None),
        head_factor=_granite_head,
        names=NameMap(
            renames=(
                Rename(r"\.block_sparse_moe\.experts\.gate_up_proj$", ".block_sparse_moe.input_linear.weight"),
                Rename(r"\.block_sparse_moe\.experts\.down_proj$", ".block_sparse_moe.output_linear.weight"),
                Rename(r"\.block_sparse_moe\.router\.weight$", ".block_sparse_moe.router.layer.weight"),
            )
        ),
        read={
            **_HEAD_TYPES,
            **dict.fromkeys(("layer_types", "layers_block_type"), list[str] | None),
            "logits_scaling": float,
        },
        fixed={"hidden_act": _SILU},
    )


GRANITE_H = mamba2_host(GraniteHConfig, Names(trunk="model", final_norm="norm", embedding="embed_tokens"))

# Nemotron-H (arXiv 2504.03624): a layer is one of Mamba2, attention, MLP, experts.

_NEMOTRON_MARKS: dict[str, LayerKind] = {"M": "recurrent", "*": "attention", "-": "other", "E": "other"}


def _nemotron_kinds(values: Values, count: int) -> list[LayerKind]:
    pattern = values.get("hybrid_override_pattern")
    marked = None if pattern is None else listed(values, count, "hybrid_override_pattern", kinds=_NEMOTRON_MARKS)
    found = listed(values, count, "layers_block_type", "layer_types")
    if found is not None and marked is not None and found != marked:
        raise CheckpointError(
            "nemotron_h config: hybrid_override_pattern and the list of layers are one setting and differ"
        )
    return found or marked or [_NEMOTRON_MARKS[mark] for mark in "ME*-"]


class NemotronHConfig(Mamba2Hybrid):
    """A Nemotron-H model."""

    MODEL_TYPE: ClassVar[str] = "nemotron_h"
    DEFAULTS: ClassVar[Mapping[str, Any]] = {"vocab_size": 131072, "hidden_size": 4096, **_TOKENS}
    HOST: ClassVar[HostModel] = HostModel(
        model="nemotron_h.modeling_nemotron_h:NemotronHModel",
        activation="mamba_hidden_act",
        layer_kinds=_nemotron_kinds,
        keys={
            "num_heads": ("mamba_num_heads", 128),
            "head_dim": ("mamba_head_dim", 64),
            "state_size": ("ssm_state_size", 128),
            "n_groups": ("n_groups", 8),
            "conv_kernel": ("conv_kernel", 4),
            "use_bias": ("use_bias", False),
            "use_conv_bias": ("use_conv_bias", True),
            "layer_norm_epsilon": ("layer_norm_epsilon", 1e-5),
        },
        options=lambda values: {"time_step_limit": (values.get("time_step_min", 0.001), math.inf)},
        mixer="HostedMamba2",
        place="mixer",
        cached=grouped(32, 8, 128),
        names=NameMap(
            joined=(
                Joined(r"\.mixer\.experts\.up_proj$", (".mixer.experts.{e}.up_proj.weight",)),
                Joined(r"\.mixer\.experts\.down_proj$", (".mixer.experts.{e}.down_proj.weight",)),
            ),
            renames=(Rename(r"^model\.", "backbone."),),
        ),
        aliases={
            "mamba_n_groups": "n_groups",
            "mamba_d_conv": "conv_kernel",
            "mamba_expand": "expand",
            "mamba_dt_min": "time_step_min",
            "mamba_dt_max": "time_step_max",
            "mamba_dt_limit": "time_step_limit",
            "mamba_dt_init_floor": "time_step_floor",
            "mamba_conv_bias": "use_conv_bias",
            "mamba_chunk_size": "chunk_size",
        },
        read={
            "time_step_min": float,
            "hybrid_override_pattern": str | None,
            **dict.fromkeys(("layer_types", "layers_block_type"), list[str] | None),
        },
        # transformers does not tie this head, nor does its attention read a window, whatever the keys say.
        fixed={"mamba_hidden_act": _SILU, "tie_word_embeddings": (False,), "sliding_window": (None,)},
        training=frozenset({"num_nextn_predict_layers"}),
    )


NEMOTRON_H = mamba2_host(NemotronHConfig, Names(trunk="backbone", final_norm="norm_f"))

# Falcon-H1 (arXiv 2507.22448): Mamba2 beside attention in each layer, and factors (muP).


def _falcon_options(values: Values) -> dict[str, Any]:
    inner = values.get("mamba_d_ssm", 1024)
    if inner is None:
        inner = values.get("mamba_expand", 2) * values["hidden_size"]
    factors = values.get("ssm_multipliers")
    if factors is not None and len(factors) != 5:
        raise CheckpointError(
            f"falcon_h1 config: ssm_multipliers must be five numbers (of z, x, B, C, dt), not {shown(factors)}"
        )
    return {
        "head_dim": _head_dim(values, inner, values.get("mamba_n_heads", 128)),
        "row_factors": tuple(factors or ()),
    }


class FalconH1Config(Mamba2Hybrid):
    """A Falcon-H1 model."""

    MODEL_TYPE: ClassVar[str] = "falcon_h1"
    DEFAULTS: ClassVar[Mapping[str, Any]] = {
        **{"vocab_size": 128000, "hidden_size": 4096, "num_hidden_layers": 32},
        **_TOKENS,
    }
    HOST: ClassVar[HostModel] = HostModel(
        model="falcon_h1.modeling_falcon_h1:FalconH1Model",
        layer_kinds=lambda values, count: ["both"] * count,
        # The host's fused GPU path ignores mamba_norm_before_gate, in training alone. We read it everywhere.
        keys=_keys(
            out_bias=("projectors_bias", False),
            gated_norm=("mamba_rms_norm", False),
            norm_before_gate=("mamba_norm_before_gate", True),
            in_factor=("ssm_in_multiplier", 1.0),
        ),
        options=_falcon_options,
        mixer="HostedMamba2",
        place="mamba",
        cached=grouped(32, 8),
        head_factor=lambda values: float(values.get("lm_head_multiplier", 1.0)),
        read={
            **_HEAD_TYPES,
            "mamba_d_ssm": int | None,
            "ssm_multipliers": list[float] | None,
            "lm_head_multiplier": float,
        },
        fixed={"hidden_act": _SILU, "mamba_use_mlp": (True,)},
    )


FALCON_H1 = mamba2_host(FalconH1Config, Names(trunk="model", final_norm="final_layernorm", embedding="embed_tokens"))

# Zamba2 (arXiv 2411.15242): Mamba2; some layers first add the output of attention blocks that layers share.

_ZAMBA2_KINDS: dict[str, LayerKind] = {"linear_attention": "recurrent", "mamba": "recurrent", "hybrid": "both"}
_ZAMBA2_HYBRID = frozenset((*range(6, 43, 6), 47, 51))


def _zamba2_kinds(values: Values, count: int) -> list[LayerKind]:
    found = listed(values, count, "layers_block_type", kinds=_ZAMBA2_KINDS)
    return found or ["both" if layer in _ZAMBA2_HYBRID else "recurrent" for layer in range(54)]


def _zamba2_options(values: Values) -> dict[str, Any]:
    inner = values.get("mamba_expand", 2) * values["hidden_size"]
    return {
        # A size in the file is not read: transformers computes it.
        "head_dim": _head_dim({}, inner, values.get("n_mamba_heads", 8)),
        "use_conv_bias": True,
        "layer_norm_epsilon": 1e-5,
        "time_step_limit": (values.get("time_step_min", 0.001), math.inf),
    }


class Zamba2Config(Mamba2Hybrid):
    """A Zamba2 model."""

    MODEL_TYPE: ClassVar[str] = "zamba2"
    DEFAULTS: ClassVar[Mapping[str, Any]] = {
        **{"vocab_size": 32000, "hidden_size": 2560, "num_hidden_layers": 54, "tie_word_embeddings": True},
        **_TOKENS,
    }
    HOST: ClassVar[HostModel] = HostModel(
        model="zamba2.modeling_zamba2:Zamba2Model",
        layer_kinds=_zamba2_kinds,
        keys={
            "num_heads": ("n_mamba_heads", 8),
            "state_size": ("mamba_d_state", 64),
            "n_groups": ("mamba_ngroups", 1),
            "conv_kernel": ("mamba_d_conv", 4),
            "use_bias": ("add_bias_linear", False),
        },
        options=_zamba2_options,
        mixer="HostedMamba2",
        place=lambda layer, kind: "mamba_decoder.mamba" if kind == "both" else "mamba",
        cached=grouped(32, None, width=2),
        attention=lambda settings: (settings.num_attention_heads, *[settings.attention_head_dim] * 2),
        used_once=r"\w+adapter_list\.\d+\..*$",
        read={"mamba_expand": int, "time_step_min": float, "layers_block_type": list[str] | None},
        # transformers finds its shared blocks by layers_block_type alone.
        fixed={"layer_types": (None,)},
    )


ZAMBA2 = mamba2_host(Zamba2Config, Names(trunk="model", final_norm="final_layernorm", embedding="embed_tokens"))
