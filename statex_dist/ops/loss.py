"""Cross entropy of a linear head that never holds the logits of more than a chunk of tokens.

With ``W [V, D]``, hidden states ``h [N, D]``, ``z = h W^T`` and the loss ``sum_n logsumexp(z_n) - z_n[target_n]``, the
gradient of ``z`` is ``softmax(z)`` less one at the target. It follows from a chunk's logits alone, so the forward pass
also computes what the backward pass needs, chunk after chunk, and forgets the logits: nothing is computed twice. Kept
are ``dh [N, D]`` in ``h``'s dtype and ``dW [V, D]`` in fp32; the backward pass multiplies both by the loss's gradient.

On a GPU the part between the matrix products is fla-core's cross entropy kernel, which overwrites the logits by their
gradient. Its own fused linear loss does more, but not what training needs here: it sums ``dW`` in bf16, or by fp32
products at a fraction of the tensor cores' rate; computes gradients where none is asked for, as in evaluation or of a
frozen head; and bounds the number of chunks by ``V / D``, which lets the logits grow with the sequence.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from statex_dist.ops import backends
from statex_dist.ops.fla_api import fla_cross_entropy_, has_fla

LOSS_CHUNK_TOKENS = 8192


def takes_kernels(x: torch.Tensor) -> bool:
    """Return whether flash-linear-attention's kernel is to run on ``x``."""
    return x.is_cuda and x.numel() > 0 and backends.takes_kernels(x, has_fla)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    ignore_index: int,
    chunk_tokens: int = LOSS_CHUNK_TOKENS,
) -> torch.Tensor:
    """Return the sum of the cross entropy of ``hidden @ weight.T``, in nats.

    It can be differentiated once.

    Args:
        hidden: ``[N, D]``.
        weight: ``[V, D]``, of the same dtype.
        targets: ``[N]`` int64.
        ignore_index: The target of tokens that do not count.
        chunk_tokens: Tokens whose logits are held at once; 0 for all.

    Returns:
        A scalar in fp32 (float64 for float64).
    """
    device = hidden.device.type
    if device in ("cuda", "cpu") and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    if not torch.is_grad_enabled():  # a Function sees which tensors could have gradients, not whether any is wanted
        hidden, weight = hidden.detach(), weight.detach()
    return _LinearCrossEntropy.apply(hidden, weight, targets, ignore_index, chunk_tokens or max(1, len(targets)))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        ignore_index: int,
        chunk_tokens: int,
    ) -> torch.Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        d_weight = (
            torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32)) if wants_weight else None
        )

        # A function of its own, so that a chunk's logits are gone before the next one's are there.
        def chunk_loss(start: int) -> torch.Tensor:
            rows = slice(start, start + chunk_tokens)
            loss, d_logits = _row_losses(
                F.linear(hidden[rows], weight), targets[rows], ignore_index, wants_hidden or wants_weight
            )
            if d_hidden is not None:
                torch.mm(d_logits, weight, out=d_hidden[rows])
            if d_weight is not None:
                _add_product(d_weight, d_logits.t(), hidden[rows])
            return loss

        losses = [chunk_loss(start) for start in range(0, max(1, len(targets)), chunk_tokens)]
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype = weight.dtype
        return torch.stack(losses).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        if d_hidden is not None:
            d_hidden = d_hidden * d_loss
        if d_weight is not None:
            d_weight = torch.mul(d_weight, d_loss, out=torch.empty_like(d_weight, dtype=ctx.weight_dtype))
        return d_hidden, d_weight, None, None, None


def _row_losses(
    logits: torch.Tensor, targets: torch.Tensor, ignore_index: int, wants_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the summed loss of logits, and their gradient if it is wanted; the kernel writes it over them."""
    if takes_kernels(logits):
        # The kernel takes a target beyond the vocabulary for none at all; PyTorch's own loss stops there.
        torch._assert_async(((targets < logits.shape[-1]) & (targets >= 0) | (targets == ignore_index)).all())
        return fla_cross_entropy_(logits, targets, ignore_index=ignore_index, gradient=wants_gradient).sum(), logits
    log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    loss = F.nll_loss(log_probs, targets, ignore_index=ignore_index, reduction="sum")
    if not wants_gradient:
        return loss, logits
    counts = (targets != ignore_index).unsqueeze(-1)
    gradient = log_probs.exp_()
    index = targets.unsqueeze(-1).where(counts, 0)
    gradient.scatter_add_(-1, index, gradient.new_full((), -1.0).expand_as(index)).mul_(counts)
    return loss, gradient.to(logits.dtype)


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add ``left @ right`` in ``total``'s precision, at the rate of the factors' where the device can."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif left.is_cuda:
        total.add_(torch.mm(left, right, out_dtype=total.dtype))
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))
