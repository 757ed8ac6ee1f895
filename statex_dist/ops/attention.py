"""Causal softmax attention of packed sequences: of each document by itself, over segments, rows and ranks.

A dense mask of a pack of 131,072 tokens takes 16 GiB, so none is made. On a GPU a kernel for packed sequences reads the
borders (``ops.packed_attention``); elsewhere documents are attended to in batches of similar lengths. A causal product
needs no mask for a document that is filled up behind its end: no token reads the filler, and its outputs are dropped.
Attention carries keys and values from one segment to the next, as a recurrence carries its state.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from statex_dist.ops.cu_seqlens import read_borders
from statex_dist.ops.packed_attention import ScoreRule, causal, packed

if TYPE_CHECKING:
    from statex_dist.distributed.context_group import ContextGroup, ContextShare


class KeyValues(NamedTuple):
    """The keys and values that an attention layer has read; what it carries on in place of a state.

    Rows of a batch may have read unequal numbers of tokens: their tokens end at the last place, and the places before
    a row's first token hold zeros. Of a pack only the last sequence is kept, which is the one that may continue.

    Attributes:
        keys: ``[S, H, L, D]``.
        values: ``[S, H, L, V]``.
        lengths: ``[S]`` int64, the tokens that each row has read.
    """

    keys: torch.Tensor
    values: torch.Tensor
    lengths: torch.Tensor


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
    window: int | None = None,
    cu_seqlens: torch.Tensor | None = None,
    before: KeyValues | None = None,
    context: ContextShare | None = None,
    output_final_state: bool = False,
) -> tuple[torch.Tensor, KeyValues | None]:
    """Attend to the tokens before each token in its own sequence, and to itself.

    Args:
        q: ``[B, HQ, T, D]``, rotated where the model rotates.
        k: ``[B, H, T, D]``; ``H`` divides ``HQ``.
        v: ``[B, H, T, V]``.
        scale: Factor of the scores; None takes ``D ** -0.5``.
        dropout: Probability with which a score is dropped.
        window: Tokens that each token sees, itself included; None sees all. States keep all of them.
        cu_seqlens: ``[S + 1]`` borders of packed sequences (``B`` is 1), or None: every row is one sequence.
        before: What was read before, or None: of each row, or of the first sequence of a pack.
        context: How the tokens connect to those of other ranks, or None.
        output_final_state: Whether to return what the next segment needs.

    Returns:
        ``[B, HQ, T, V]``, and keys and values of each row, or of a pack's last sequence; None unless asked for.
    """
    score = ScoreRule(scale, dropout, window)
    if cu_seqlens is None:
        assert context is None, "ranks share packs"
        return _of_rows(q, k, v, before, score, output_final_state=output_final_state)
    assert len(q) == 1, q.shape
    history, after = 0, None
    if before is not None:
        history = int(before.lengths[0])
        k, v = (_joined(*pair) for pair in zip(_tail_of(before, history), (k, v), strict=True))
    if context is not None:
        k, v, history, after = _with_other_ranks(k, v, cu_seqlens, context, history)
    marks = read_borders(cu_seqlens)
    o = packed(q, k, v, marks, score, history=history)
    if output_final_state and context is None:
        # The first sequence began before the tokens, by the number of keys beyond that of the queries.
        start = marks[-2] + (history if len(marks) > 2 else 0)
        length = torch.full((1,), k.shape[2] - start, device=k.device)
        after = KeyValues(k[:, :, start:], v[:, :, start:], length)
    return o, after if output_final_state else None


def _of_rows(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    before: KeyValues | None,
    score: ScoreRule,
    *,
    output_final_state: bool,
) -> tuple[torch.Tensor, KeyValues | None]:
    """Attend in each row of a batch, after what the row has read before."""
    tokens = k.shape[2]
    lengths = torch.zeros(len(k), dtype=torch.int64, device=k.device) if before is None else before.lengths
    if before is None or not before.keys.shape[2]:
        o = causal(q, k, v, score)
    else:
        k, v = (_joined(*pair) for pair in zip(before[:2], (k, v), strict=True))
        read = before.keys.shape[2]
        # Tensors of shapes alone (``meta``) tell no lengths: rows are then equal.
        if lengths.is_meta or bool((lengths == read).all()):
            o = causal(q, k, v, score)
        else:
            place = torch.arange(k.shape[2], device=k.device)
            row = torch.arange(tokens, device=k.device)[:, None] + read
            seen = (place >= (read - lengths)[:, None, None]) & (place <= row)
            if score.window is not None:
                seen = seen & (place > row - score.window)
            o = score.product(q, k, v, attn_mask=seen[:, None])
    return o, KeyValues(k, v, lengths + tokens) if output_final_state else None


def _joined(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    return torch.cat([old.to(new.dtype), new], dim=2)


def _tail_of(state: KeyValues, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first row's last keys and values."""
    start = state.keys.shape[2] - length
    return state.keys[:1, :, start:], state.values[:1, :, start:]


def _with_other_ranks(
    k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, context: ContextShare, history: int
) -> tuple[torch.Tensor, torch.Tensor, int, KeyValues]:
    """Return keys and values from the begin of this share's first sequence on, and those of the pack's last one.

    Each rank gathers the keys and values of all: memory of a layer grows with the pack, not with its square. Every rank
    takes its own out of those that it gathered, so that all take part in the exchange of the backward pass.

    Args:
        k: ``[1, H, history + T, D]`` of this share, behind what the pack's first sequence has read before the pack.
        v: ``[1, H, history + T, V]``.
        cu_seqlens: Borders of this share.
        context: How the share connects to the others.
        history: Tokens read before the pack.

    Returns:
        Keys and values, the number of tokens in them before this share, and the state after the pack.
    """
    group, size = context.group, k.shape[-1]
    both = torch.cat([k, v], dim=-1)
    own = both[:, :, history:]
    # Where the share's last sequence begins in it; -1 where that one began on an earlier rank.
    mark = -1 if context.passes else int(cu_seqlens[-2])
    facts = group.all_gather(torch.tensor([own.shape[2], mark], device=k.device))
    lengths, marks = ([int(fact[place]) for fact in facts] for place in (0, 1))
    whole = torch.cat([both[:, :, :history], *_Gather.apply(own, lengths, group)], dim=2)
    # Of each share its first token, and where the sequence begins that comes into it from before.
    position, entered, places = history, 0, []
    for length, begin in zip(lengths, marks, strict=True):
        places.append((position, entered))
        entered = entered if begin < 0 else position + begin
        position += length
    start, first = places[group.rank]
    first = first if context.opens else start
    last = whole[:, :, entered:].detach()
    after = KeyValues(last[..., :size], last[..., size:], torch.full((1,), position - entered, device=k.device))
    mine = whole[:, :, first : start + own.shape[2]]
    return mine[..., :size], mine[..., size:], start - first, after


class _Gather(torch.autograd.Function):
    """Gather the tokens of all ranks; backward each rank gets the sum of all ranks' gradients for its own."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, lengths: list[int], group: ContextGroup):
        ctx.lengths, ctx.group = lengths, group
        most = max(lengths)
        parts = group.all_gather(F.pad(x, (0, 0, 0, most - x.shape[2])))
        return tuple(part[:, :, :length] for part, length in zip(parts, lengths, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: torch.Tensor):
        whole = torch.cat(grads, dim=2).contiguous()
        dist.all_reduce(whole, group=ctx.group.group)
        start = sum(ctx.lengths[: ctx.group.rank])
        return whole[:, :, start : start + ctx.lengths[ctx.group.rank]], None, None
