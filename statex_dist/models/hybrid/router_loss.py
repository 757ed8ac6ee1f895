"""The load-balancing loss of a host's experts (Switch Transformer, arXiv 2101.03961, equations 4 to 6).

It is transformers' ``load_balancing_loss_func``: with ``f[e]`` the share of all tokens of all layers that chose expert
``e``, and ``P[e]`` the mean of its probability, ``E * sum(f[e] * P[e])``. Tests compare both. Written by us for ranks
that share a pack: ``f`` has no gradient and is summed over them, and ``P`` is a mean, of which each has its part.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from statex_dist.batch import IGNORE_INDEX
from statex_dist.distributed.context_group import ContextShare

FUNCTION = "load_balancing_loss_func"


def has_experts(host: PreTrainedModel) -> bool:
    """Return whether a host has layers with routed experts."""
    return any(name.endswith(".experts.down_proj") for name, _ in host.named_parameters())


def has_router_loss(host: PreTrainedModel) -> bool:
    """Return whether transformers trains a host's routers with the loss above."""
    return has_experts(host) and hasattr(sys.modules[type(host).__module__], FUNCTION)


def asked_coefficient(host: PreTrainedModel) -> float:
    """Return the factor that a host's configuration gives the loss; 0 where it does not ask for it."""
    config = host.config
    if not (getattr(config, "output_router_logits", False) and has_router_loss(host)):
        return 0.0
    return float(getattr(config, "router_aux_loss_coef", 0.0) or 0.0)


def router_loss(
    logits: Sequence[torch.Tensor],
    labels: torch.Tensor,
    *,
    top_k: int,
    padding: int = 0,
    context: ContextShare | None = None,
) -> torch.Tensor:
    """Return the load-balancing loss of a batch, times its targets: a mean over targets weighs it as it does a token.

    Args:
        logits: Of each layer's router, ``[B * T, E]``.
        labels: ``[B, T]``, :data:`~statex_dist.batch.IGNORE_INDEX` where there is no target.
        top_k: Experts of a token.
        padding: Tokens at the end of each row that are no text.
        context: How the tokens connect to those of other ranks, or None; the loss is then this rank's part of that of
            the whole pack.

    Returns:
        A scalar in fp32.
    """
    rows, tokens = labels.shape
    experts = logits[0].shape[-1]
    counts = torch.zeros(experts, dtype=torch.float32, device=labels.device)
    probabilities = counts
    for layer in logits:
        routed = layer.view(rows, tokens, experts)[:, : tokens - padding].softmax(-1)
        chosen = routed.detach().topk(top_k, dim=-1).indices
        counts = counts + torch.zeros_like(counts).index_add(0, chosen.flatten(), counts.new_ones(chosen.numel()))
        probabilities = probabilities + routed.float().sum((0, 1))
    seen = counts.new_tensor([rows * (tokens - padding) * len(logits), 0.0])
    seen[1] = (labels != IGNORE_INDEX).sum()
    if context is not None:
        dist.all_reduce(shared := torch.cat([counts.double(), seen.double()]), group=context.group.group)
        counts, seen = shared[:experts].to(counts.dtype), shared[experts:].to(counts.dtype)
    all_tokens, targets = seen[0].clamp(min=1), seen[1]
    return experts * targets * torch.sum(counts / all_tokens * probabilities / all_tokens)
