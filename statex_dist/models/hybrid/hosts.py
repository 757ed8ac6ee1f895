"""The models of transformers that we run with recurrent layers of our own: a row each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from statex_dist.models.hybrid.config import HostModel, LayerKind, Values
from statex_dist.models.hybrid.delta import DeltaHybrid, delta_host, gated_delta_keys
from statex_dist.models.hybrid.mamba2 import Mamba2Hybrid, mamba2_host
from statex_dist.models.hybrid.names import Joined, NameMap, Rename
from statex_dist.models.layout import Names

_KINDS: dict[str, LayerKind] = {
    "linear_attention": "recurrent",
    "mamba": "recurrent",
    "full_attention": "attention",
    "attention": "attention",
    "mlp": "other",
    "moe": "other",
}


def _listed(values: Values, count: int, *keys: str) -> list[LayerKind] | None:
    """Return the kinds of the list that one of these keys holds, or None."""
    found = next((values[key] for key in keys if values.get(key) is not None), None)
    return None if found is None else [_KINDS.get(kind, "other") for kind in found]


def _every(values: Values, count: int, interval: int) -> list[LayerKind]:
    """Return the kinds where every ``interval``-th layer is attention."""
    return ["recurrent" if (layer + 1) % interval else "attention" for layer in range(count)]


# Bamba (arXiv n/a; IBM, Princeton, UIUC): Mamba2 with a few attention layers.


def _bamba_kinds(values: Values, count: int) -> list[LayerKind]:
    attention = values.get("attn_layer_indices") or ()
    return ["attention" if layer in attention else "recurrent" for layer in range(count)]


def _mamba2_keys(**changed: tuple[str, Any]) -> dict[str, tuple[str, Any]]:
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


def _head_dim(values: Values) -> dict[str, Any]:
    """Return the head size of a model in which it may be ``auto``."""
    size = values.get("mamba_d_head", "auto")
    inner = (values.get("mamba_expand") or 2) * values["hidden_size"]
    return {"head_dim": inner // (values.get("mamba_n_heads") or 128) if size in ("auto", None) else size}


class BambaConfig(Mamba2Hybrid):
    """A Bamba model."""

    MODEL_TYPE: ClassVar[str] = "bamba"
    DEFAULTS: ClassVar[Mapping[str, Any]] = {"vocab_size": 128000, "hidden_size": 4096, "num_hidden_layers": 32}
    HOST: ClassVar[HostModel] = HostModel(
        model="bamba.modeling_bamba:BambaModel",
        layer_kinds=_bamba_kinds,
        keys=_mamba2_keys(),
        options=_head_dim,
        mixer="HostedMamba2",
        place="mamba",
    )


BAMBA = mamba2_host(BambaConfig, Names(trunk="model", final_norm="final_layernorm", embedding="embed_tokens"))


# Nemotron-H (arXiv 2504.03624): a layer is one of Mamba2, attention, MLP, experts.

_PATTERN: dict[str, LayerKind] = {"M": "recurrent", "*": "attention", "-": "other", "E": "other"}


def _nemotron_kinds(values: Values, count: int) -> list[LayerKind]:
    if listed := _listed(values, count, "layers_block_type", "layer_types"):
        return listed
    return [_PATTERN[mark] for mark in values.get("hybrid_override_pattern", "ME*-")]


def _nemotron_options(values: Values) -> dict[str, Any]:
    # Its mixer takes steps from time_step_min up in place of time_step_limit.
    return {"time_step_limit": (values.get("time_step_min", 0.001), math.inf)}


class NemotronHConfig(Mamba2Hybrid):
    """A Nemotron-H model."""

    MODEL_TYPE: ClassVar[str] = "nemotron_h"
    DEFAULTS: ClassVar[Mapping[str, Any]] = {"vocab_size": 131072, "hidden_size": 4096}
    HOST: ClassVar[HostModel] = HostModel(
        model="nemotron_h.modeling_nemotron_h:NemotronHModel",
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
        options=_nemotron_options,
        mixer="HostedMamba2",
        place="mixer",
        names=NameMap(
            joined=(
                Joined(r"\.mixer\.experts\.up_proj$", (".mixer.experts.{e}.up_proj.weight",)),
                Joined(r"\.mixer\.experts\.down_proj$", (".mixer.experts.{e}.down_proj.weight",)),
            ),
            renames=(Rename(r"^model\.", "backbone."),),
        ),
    )


NEMOTRON_H = mamba2_host(NemotronHConfig, Names(trunk="backbone", final_norm="norm_f"))


# Qwen3-Next: Gated DeltaNet, every fourth layer attention, experts in each.


def _qwen_kinds(values: Values, count: int) -> list[LayerKind]:
    return _listed(values, count, "layer_types") or _every(values, count, values.get("full_attention_interval") or 4)


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
        names=NameMap(joined=QWEN_EXPERTS),
    )


QWEN3_NEXT = delta_host(
    Qwen3NextConfig, Names(trunk="model", final_norm="norm", embedding="embed_tokens"), form="fused"
)
