"""The models of transformers that we run with delta-rule layers of our own: a row each (Mamba2: ``mamba2_hosts``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from statex_dist.models.hybrid.config import HostModel
from statex_dist.models.hybrid.delta import DeltaHybrid, delta_host, gated_delta_keys
from statex_dist.models.hybrid.layer_lists import LayerKind, Values, every, listed
from statex_dist.models.hybrid.names import Joined, NameMap
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
        names=NameMap(joined=QWEN_EXPERTS),
    )


QWEN3_NEXT = delta_host(
    Qwen3NextConfig, Names(trunk="model", final_norm="norm", embedding="embed_tokens"), form="fused"
)
