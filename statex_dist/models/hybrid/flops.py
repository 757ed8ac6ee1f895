"""FLOPs of a hybrid's forward pass: its matrices, of experts the active ones, and its attention.

Counted on the model that is run, made without memory: a host's tensors are known to transformers alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

from statex_dist.models.hybrid.model import host_model, host_settings
from statex_dist.models.layout import GAIN_NAME

_NO_MATRICES = re.compile(rf"(A_log|{GAIN_NAME}|embed_tokens\.weight|embeddings\.weight)$")
"""Tensors of two and more axes that multiply no token, or one number each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HostFlops:
    """FLOPs of a forward pass but for the recurrences.

    Attributes:
        per_token: Of all matrices and convolutions, for one token.
        per_pair: Of all attention layers, for a token and one that it reads.
    """

    per_token: int
    per_pair: int


def host_flops(config: Any) -> HostFlops:
    """Count the FLOPs of a model.

    Args:
        config: The configuration of a hybrid with its plan.

    Raises:
        ConfigError: This transformers cannot build it.
    """
    with torch.device("meta"):
        model = host_model(config)
    once = config.HOST.used_once
    settings = host_settings(config)
    elements = config.vocab_size * config.hidden_size  # the head
    shared = re.compile(once) if once else None
    seen: set[str] = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.dim() < 2 or _NO_MATRICES.search(name):
            continue
        # Layers that share a block use its matrices once each, and of its adapters each layer its own.
        if shared and (own := shared.search(name)):
            if own[0] in seen:
                continue
            seen.add(own[0])
        active = settings.num_experts_per_tok if ".experts." in name and parameter.dim() == 3 else None
        elements += parameter.numel() if active is None else parameter[0].numel() * active
    heads, keys, values = config.HOST.attention(settings)
    return HostFlops(per_token=2 * elements, per_pair=2 * heads * (keys + values) * len(config.attention_layers))
