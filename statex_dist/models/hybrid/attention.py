"""The attention function that hosts call in our forward passes (transformers' attention interface)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from statex_dist.errors import ConfigError
from statex_dist.models.hybrid.mixers import HostCall
from statex_dist.ops.attention import KeyValues, attention

NAME = "statex"
"""Of the function in transformers' registry."""


def hosted_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    statex: HostCall | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend in each sequence; shapes are those of transformers: ``[B, H, T, D]`` in, ``[B, T, H, V]`` out.

    Raises:
        ConfigError: The layer asks for something else than causal attention over whole sequences.
    """
    if statex is None:
        raise ConfigError("the host's layers were called without our forward pass: call the model itself")
    for name in ("sliding_window", "s_aux", "softcap"):
        if kwargs.get(name) is not None:
            raise ConfigError(f"{type(module).__name__} asks for attention with {name}, which is not supported")
    assert attention_mask is None, "masks are made of documents"
    sequences, before = statex.sequences, statex.state("attention")
    o, after = attention(
        query,
        key,
        value,
        scale=scaling,
        dropout=dropout,
        cu_seqlens=sequences.cu_seqlens,
        before=None if before is None else KeyValues(*before),
        context=sequences.context,
        output_final_state=sequences.output_states,
    )
    statex.keep("attention", after)
    return o.transpose(1, 2), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Return no mask: documents are attended to one by one."""


def register() -> None:
    """Add the function to transformers' registries."""
    ALL_ATTENTION_FUNCTIONS.register(NAME, hosted_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, _no_mask)
