"""Causal attention inside each of several packed sequences, without a mask over the pack.

Three ways, all exact. On a GPU that has it, flash-attention's kernel for packed sequences. Else, batches of sequences
of similar lengths: a loop over 512 short documents would cost 512 calls. Few or long sequences go one by one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from statex_dist.ops.cu_seqlens import rearrange

_LONG = 512
"""Tokens of a sequence from which on it is never filled up: a call of its own costs less than the filler."""
_FILL = 0.8
"""Length of the shortest sequence of a batch, as a share of the longest."""
_MASK_ELEMENTS = 1 << 22
"""Elements of a mask between the queries of a segment and all keys before them, on a CPU."""
_LARGEST_HEAD = 256
"""Channels of a head in flash-attention."""
_WINDOW_QUERIES = 128
"""Fewest queries that share a mask: short windows would take a call for a few tokens each."""


class ScoreRule(NamedTuple):
    """How scores are computed and which of them count.

    Attributes:
        scale: Factor of the scores; None takes ``D ** -0.5``.
        dropout: Probability with which a score is dropped.
        window: Tokens that each token sees, itself included; None sees all.
    """

    scale: float | None = None
    dropout: float = 0.0
    window: int | None = None

    def product(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **mask: Any) -> torch.Tensor:
        """Return PyTorch's attention.

        Of shapes alone (``meta``), where memory is counted, it would hold the scores of all pairs of tokens; there the
        operator of a CPU is called, which does not.
        """
        if q.is_meta:
            bias = mask.pop("attn_mask", None)
            bias = None if bias is None else bias.to(q.dtype)
            found: torch.Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, self.dropout, **mask, attn_mask=bias, scale=self.scale
            )[0]
            return found
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(
            q, k, v, dropout_p=self.dropout, scale=self.scale, enable_gqa=grouped, **mask
        )


def packed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    marks: Sequence[int],
    score: ScoreRule,
    *,
    history: int = 0,
) -> torch.Tensor:
    """Attend inside each sequence.

    Args:
        q: ``[1, HQ, T, D]``.
        k: ``[1, H, history + T, D]``; ``H`` divides ``HQ``.
        v: ``[1, H, history + T, V]``.
        marks: Borders of the sequences in ``q``, from 0 to ``T``.
        score: How scores are computed.
        history: Keys of the first sequence that come before its first query.

    Returns:
        ``[1, HQ, T, V]``.
    """
    if takes_varlen(q, v, score.dropout):
        return _by_kernel(q, k, v, marks, history, score)
    first = marks[1] if history else 0
    parts = []
    if first:
        parts.append(causal(q[:, :, :first], k[:, :, : history + first], v[:, :, : history + first], score))
    rest = tuple(stop - start for start, stop in itertools.pairwise(marks[bool(history) :]) if stop > start)
    if rest:
        tokens = (q[:, :, first:], k[:, :, history + first :], v[:, :, history + first :])
        batches = _batches(rest, q.device)
        if len(batches.shapes) < len(rest):
            parts.append(_by_batches(*tokens, batches, score))
        else:
            pieces = zip(*(y.split(rest, dim=2) for y in tokens), strict=True)
            parts += [causal(a, b, c, score) for a, b, c in pieces]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, score: ScoreRule) -> torch.Tensor:
    """Return the outputs of the last tokens of each row, of whose keys the last belong to them."""
    queries, keys = q.shape[2], k.shape[2]
    if score.window is not None and score.window < keys:
        return _windowed(q, k, v, score, score.window)
    if queries in (1, keys):
        return score.product(q, k, v, is_causal=queries > 1)
    if q.is_cuda:
        from torch.nn.attention.bias import causal_lower_right  # a second of imports, which a CPU does not need

        return score.product(q, k, v, attn_mask=causal_lower_right(queries, keys))
    step = max(1, _MASK_ELEMENTS // keys)
    if step >= queries:
        seen = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
        return score.product(q, k, v, attn_mask=seen)
    # A CPU has no kernel for this form and makes the mask, which autograd would keep: block by block, made again.
    outputs = []
    for start in range(0, queries, step):
        stop = min(start + step, queries)
        read = keys - queries + stop
        block = (q[:, :, start:stop], k[:, :, :read], v[:, :, :read], score)
        outputs.append(checkpoint(causal, *block, use_reentrant=False) if torch.is_grad_enabled() else causal(*block))
    return torch.cat(outputs, dim=2)


def _windowed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, score: ScoreRule, window: int) -> torch.Tensor:
    """Return the outputs of :func:`causal` where tokens see a window; blocks of queries take the keys that they see.

    Memory of masks grows with the window, not with the sequence.
    """
    queries, keys = q.shape[2], k.shape[2]
    size = max(window, _WINDOW_QUERIES)
    outputs = []
    for start in range(0, queries, size):
        stop = min(start + size, queries)
        last = keys - queries + stop
        first = max(last - (stop - start) - window + 1, 0)
        row = torch.arange(last - (stop - start), last, device=q.device)[:, None]
        place = torch.arange(first, last, device=q.device)
        seen = (place <= row) & (place > row - window)
        read = slice(first, last)
        outputs.append(score.product(q[:, :, start:stop], k[:, :, read], v[:, :, read], attn_mask=seen))
    return torch.cat(outputs, dim=2)


@dataclass(frozen=True, slots=True)
class _Batches:
    """Sequences in batches of similar lengths.

    Attributes:
        shapes: Sequences and tokens of each in a batch.
        gather: Token of each place of all batches; the number of tokens where there is none.
        scatter: Place of each token.
    """

    shapes: tuple[tuple[int, int], ...]
    gather: torch.Tensor
    scatter: torch.Tensor


@lru_cache(maxsize=8)
def _batches(lengths: tuple[int, ...], device: torch.device) -> _Batches:
    """Put sequences into batches; every layer of a pass asks for the same."""
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    groups: list[list[int]] = []
    for place in order:
        longest = lengths[groups[-1][0]] if groups else 0
        fits = lengths[place] == longest or (longest <= _LONG and lengths[place] >= _FILL * longest)
        if groups and fits:
            groups[-1].append(place)
        else:
            groups.append([place])
    shapes = tuple((len(group), lengths[group[0]]) for group in groups)
    starts = torch.tensor([0, *itertools.accumulate(lengths)])
    pieces = []
    for group, (_, size) in zip(groups, shapes, strict=True):
        places = torch.arange(size)
        mine = torch.tensor(group)
        index = starts[mine][:, None] + places
        pieces.append(index.masked_fill(places >= torch.tensor(lengths)[mine][:, None], int(starts[-1])).flatten())
    gather = torch.cat(pieces)
    scatter = torch.empty(int(starts[-1]) + 1, dtype=torch.int64)
    scatter[gather] = torch.arange(len(gather))
    return _Batches(shapes, gather.to(device), scatter[:-1].to(device))


def _by_batches(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batches: _Batches, score: ScoreRule) -> torch.Tensor:
    sizes = [count * size for count, size in batches.shapes]
    flat = (rearrange(y[0].transpose(0, 1), batches.gather, batches.scatter).split(sizes) for y in (q, k, v))
    outputs = []
    for shape, *parts in zip(batches.shapes, *flat, strict=True):
        a, b, c = (part.unflatten(0, shape).transpose(1, 2) for part in parts)
        outputs.append(causal(a, b, c, score).transpose(1, 2).flatten(0, 1))
    return rearrange(torch.cat(outputs), batches.scatter, batches.gather).transpose(0, 1)[None]


@cache
def varlen_kernel() -> Callable[..., Any] | None:
    """Return torch's form of flash-attention for packed sequences, or None where this torch (below 2.10) has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    found: Callable[..., Any] = varlen_attn
    return found


def takes_varlen(q: torch.Tensor, v: torch.Tensor, dropout: float) -> bool:
    """Return whether flash-attention's kernel for packed sequences is to run."""
    if not q.is_cuda or torch.version.cuda is None or dropout or varlen_kernel() is None:
        return False
    half = q.dtype in (torch.bfloat16, torch.float16)
    return (
        half and max(q.shape[-1], v.shape[-1]) <= _LARGEST_HEAD and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )


def _by_kernel(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, marks: Sequence[int], history: int, score: ScoreRule
) -> torch.Tensor:
    """Call the kernel, which takes ``[T, H, D]`` with heads of one size, a multiple of 8."""
    values = v.shape[-1]
    size = -(-max(q.shape[-1], values) // 8) * 8
    tokens = (F.pad(y[0].transpose(0, 1), (0, size - y.shape[-1])) for y in (q, k, v))
    inside = [0, *(mark for before, mark in itertools.pairwise(marks) if mark > before)]
    of_keys = [0, *(mark + history for mark in inside[1:])]
    borders = [torch.tensor(x, dtype=torch.int32, device=q.device) for x in (inside, of_keys)]
    longest = [max(b - a for a, b in itertools.pairwise(x)) for x in (inside, of_keys)]
    kernel = varlen_kernel()
    assert kernel is not None, "takes_varlen says so"
    o = kernel(
        *tokens,
        *borders,
        *longest,
        scale=q.shape[-1] ** -0.5 if score.scale is None else score.scale,
        # Causal, as flash-attention has it: of fewer queries than keys the last belong together.
        window_size=(-1 if score.window is None else score.window - 1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return o[..., :values].transpose(0, 1)[None]
