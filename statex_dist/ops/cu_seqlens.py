"""Packed sequences by their borders ``cu_seqlens [S + 1]``: read, looked up by token, and cut into chunks with decays.

Every sequence starts a chunk of its own, so that its initial and final states are simply those at its first and after
its last chunk; the tail of its last chunk is filled with tokens that change nothing (zero keys, zero decay). Sequences
are sorted by length and chunks ordered by their position within the sequence: the sequences still running at position
``p`` are then a prefix, and one loop over ``p`` carries all of them at once. Fifty short documents cost a few steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch.utils.weak import WeakTensorKeyDictionary

from statex_dist.errors import ConfigError
from statex_dist.ops.chunk_groups import Body, ChunkRun


def read_borders(cu_seqlens: torch.Tensor) -> tuple[int, ...]:
    """Return borders as integers; those of one tensor are copied from its device once, though every layer asks."""
    if cu_seqlens.is_inference():  # its changes are not counted
        return tuple(cu_seqlens.tolist())
    version = cu_seqlens._version
    known = _BORDERS.get(cu_seqlens)
    if known is None or known[0] != version:
        known = _BORDERS[cu_seqlens] = (version, tuple(cu_seqlens.tolist()))
    return known[1]


_BORDERS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Borders that were read, with the version of their tensor at that time."""


def borders_of(cu_seqlens: torch.Tensor) -> list[tuple[int, int]]:
    """Return ``(start, stop)`` of each packed sequence."""
    return list(itertools.pairwise(read_borders(cu_seqlens)))


def sequence_lengths(batch: int, num_tokens: int, cu_seqlens: torch.Tensor | None) -> tuple[int, ...]:
    """Return the lengths of all sequences of a batch, packed or not."""
    if cu_seqlens is None:
        return (num_tokens,) * batch
    if batch != 1:
        raise ValueError(f"packed sequences (cu_seqlens) need a batch of 1, not {batch}")
    marks = read_borders(cu_seqlens)
    if marks[0] != 0 or marks[-1] != num_tokens or any(b < a for a, b in itertools.pairwise(marks)):
        raise ValueError(f"cu_seqlens must rise from 0 to the number of tokens {num_tokens}, not {list(marks)}")
    return tuple(b - a for a, b in itertools.pairwise(marks))


def sequence_index(cu_seqlens: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Return the index of each token's sequence, ``[T]`` int64 (mamba_ssm's ``seq_idx``, but for the dtype)."""
    index = torch.arange(num_tokens, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].to(index.dtype), index, right=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkLayout(ChunkRun):
    """Positions of ``num_chunks x chunk_size`` places in a flat row of tokens.

    Attributes:
        num_chunks: Number of chunks.
        chunk_size: Tokens per chunk.
        gather: ``[num_chunks * chunk_size]`` index of each place's token; filler places hold the number of tokens.
        scatter: ``[num_tokens]`` place of each token.
        order: ``[S]`` sequence of each rank, longest first.
        rank: ``[S]`` rank of each sequence.
        identity: Whether ``gather`` is 0, 1, 2, ..., so that a view suffices.
    """

    num_chunks: int
    chunk_size: int
    gather: torch.Tensor
    scatter: torch.Tensor
    order: torch.Tensor
    rank: torch.Tensor
    identity: bool

    def to_chunks(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``[num_chunks, H, chunk_size, ...]`` from ``x [B, T, H, ...]``, fillers zero."""
        flat = x.flatten(0, 1)
        if not self.identity:
            flat = _Rearrange.apply(flat, self.gather, self.scatter)
        return flat.unflatten(0, (self.num_chunks, self.chunk_size)).transpose(1, 2)

    def from_chunks(self, x: torch.Tensor, batch: int) -> torch.Tensor:
        """Return ``[B, T, H, ...]`` from ``x [num_chunks, H, chunk_size, ...]``: the inverse of :meth:`to_chunks`."""
        flat = x.transpose(1, 2).flatten(0, 1)
        if not self.identity:
            flat = _Rearrange.apply(flat, self.scatter, self.gather)
        return flat.unflatten(0, (batch, -1))

    def scan_values(
        self,
        body: Body,
        inputs: Sequence[torch.Tensor],
        v: torch.Tensor | Sequence[torch.Tensor],
        initial_state: torch.Tensor | None,
        rows: Sequence[int],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run a chunked scan over values ``[B, T, H, V]``, or over several that stand side by side, each by itself.

        Args:
            body: Takes the chunks of ``inputs`` and of each value, and for each value the states of each block of rows.
            inputs: ``[B, T, ...]`` each.
            v: The values.
            initial_state: ``[S, H, K, V]``, side by side as the values are, or None.
            rows: Sizes of the blocks of a state's rows. With more than one block the body makes wide tensors, and runs
                over groups of chunks.

        Returns:
            Outputs ``[B, T, H, V]`` in the values' dtype and final states, side by side.
        """
        values = [v] if isinstance(v, torch.Tensor) else v
        wide = torch.promote_types(inputs[0].dtype, torch.float32)
        given = [None] * len(values) if initial_state is None else initial_state.chunk(len(values), dim=-1)
        states = []
        for value, state in zip(values, given, strict=True):
            parts = [None] * len(rows) if state is None else state.split(list(rows), dim=-2)
            for size, part in zip(rows, parts, strict=True):
                like = value.new_zeros(0, value.shape[2], size, value.shape[3], dtype=wide)
                states.append(self.first_state(like, part))
        chunks = [self.to_chunks(x) for x in (*inputs, *values)]
        width = sum(rows) * values[0].shape[2] * (2 * self.chunk_size + 2 * sum(x.shape[3] for x in values))
        outputs, finals = self.run_chunks(body, chunks, states, width * wide.itemsize if len(rows) > 1 else None)
        out = [self.from_chunks(o, len(value)).to(value.dtype) for o, value in zip(outputs, values, strict=True)]
        final = [join(finals[i : i + len(rows)], dim=-2) for i in range(0, len(finals), len(rows))]
        return join(out, dim=-1), join(final, dim=-1)

    def first_state(self, like: torch.Tensor, initial_state: torch.Tensor | None) -> torch.Tensor:
        """Return the states ``[S, ...]`` before each sequence's first chunk, by rank.

        Args:
            like: ``[any, ...state]``.
            initial_state: ``[S, ...state]`` or None for zero.
        """
        if initial_state is None:
            return like.new_zeros(len(self.order), *like.shape[1:])
        return initial_state.to(like.dtype).index_select(0, self.order)

    def run_chunks(
        self, body: Body, chunks: Sequence[torch.Tensor], states: Sequence[torch.Tensor], chunk_bytes: int | None
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Run a body over all chunks, from states of :meth:`first_state`; return outputs and final states ``[S, ...]``.

        Args:
            body: As for :meth:`run`.
            chunks: Tensors ``[num_chunks, ...]``.
            states: Tensors ``[S, ...]``, by rank.
            chunk_bytes: As for :meth:`run`.
        """
        outputs, finals = self.run(body, chunks, states, chunk_bytes)
        return outputs, [state.index_select(0, self.rank) for state in finals]


def join(tensors: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    """Concatenate tensors; one alone is returned as it is."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim=dim)


class _Rearrange(torch.autograd.Function):
    """``y[i] = x[index[i]]``, zero where the index is out of range.

    No row is read twice, so the gradient is a gather by the inverse index: autograd's own backward of index_select
    would add row by row.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, index: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(index, inverse)
        return _gather_rows(x, index)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        index, inverse = ctx.saved_tensors
        return _Rearrange.apply(grad, inverse, index), None, None


def rearrange(x: torch.Tensor, index: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Return the rows ``y[i] = x[index[i]]``, zero where the index is out of range.

    Args:
        x: ``[N, ...]``.
        index: ``[M]`` int64; no row of ``x`` twice.
        inverse: ``[N]`` int64, the place in ``y`` of each row of ``x``.
    """
    return _Rearrange.apply(x, index, inverse)


def _gather_rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    filler = x.new_zeros(1, *x.shape[1:])
    return torch.cat([x, filler]).index_select(0, index.clamp(max=x.shape[0]))


SMALLEST_BLOCK = 4
"""Tokens of the smallest chunk."""
CHUNK_SIZES = (64, 32, 16)
"""The first is fastest on a CPU for long sequences."""
_LARGEST_FILL = 0.25


def pick_chunk_size(lengths: tuple[int, ...], sizes: tuple[int, ...] = CHUNK_SIZES) -> int:
    """Return the largest chunk whose fillers stay below a quarter of the tokens, or the smallest there is.

    A pack of short documents would be mostly fillers.

    Args:
        lengths: Tokens of each sequence.
        sizes: Sizes to choose from, the largest first.
    """
    total = sum(lengths)
    for size in sizes:
        if sum(-(-length // size) * size for length in lengths) <= (1 + _LARGEST_FILL) * total:
            return size
    return sizes[-1]


def power_of_two_chunks(
    lengths: tuple[int, ...],
    chunk_size: int | None,
    *,
    smallest: int = SMALLEST_BLOCK,
    sizes: tuple[int, ...] = CHUNK_SIZES,
) -> int:
    """Return the chunk size to use: the one asked for, or the one of ``sizes`` that fits the sequences.

    Raises:
        ConfigError: The one asked for is not a power of two from ``smallest``.
    """
    if chunk_size is None:
        return pick_chunk_size(lengths, sizes)
    if chunk_size < smallest or chunk_size & (chunk_size - 1):
        raise ConfigError(f"chunk_size must be a power of two from {smallest}, not {chunk_size}")
    return chunk_size


def index_tensor(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """Return an index of a cached layout; one made under inference mode could not serve a later training step."""
    with torch.inference_mode(False):
        return torch.from_numpy(np.ascontiguousarray(values)).to(device)


def cut_chunks(lengths: tuple[int, ...], chunk_size: int) -> tuple[np.ndarray, ...]:
    """Cut sequences that lie one behind the other into chunks, each of one sequence.

    Returns:
        Of each chunk, in the order of tokens and all int64: its sequence, its position among the sequence's chunks,
        its first token, and its number of tokens.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    chunks = -(-sizes // chunk_size)
    sequence = np.repeat(np.arange(len(sizes)), chunks)
    position = np.arange(len(sequence)) - (np.cumsum(chunks) - chunks)[sequence]
    ends = np.cumsum(sizes)
    start = (ends - sizes)[sequence] + position * chunk_size
    return sequence, position, start, np.minimum(chunk_size, ends[sequence] - start)


@lru_cache(maxsize=64)
def chunk_layout(lengths: tuple[int, ...], chunk_size: int, device: torch.device) -> ChunkLayout:
    """Return the layout of sequences that lie one behind the other.

    Args:
        lengths: Tokens of each sequence; 0 is allowed.
        chunk_size: Tokens per chunk.
        device: Where the index tensors live.
    """
    sequence, position, start, count = cut_chunks(lengths, chunk_size)
    total = sum(lengths)
    order = np.argsort(-np.bincount(sequence, minlength=len(lengths)), kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    by_position = np.lexsort((rank[sequence], position))
    offsets = np.arange(chunk_size)
    places = np.where(offsets < count[:, None], start[:, None] + offsets, total)
    gather = places[by_position].ravel()
    scatter = np.empty(total, dtype=np.int64)
    valid = gather < total
    scatter[gather[valid]] = np.flatnonzero(valid)
    return ChunkLayout(
        num_chunks=len(sequence),
        chunk_size=chunk_size,
        gather=index_tensor(gather, device),
        scatter=index_tensor(scatter, device),
        active=tuple(np.bincount(position).tolist()),
        order=index_tensor(order, device),
        rank=index_tensor(rank, device),
        identity=len(gather) == total and bool((gather == np.arange(total)).all()),
    )


def power_of_two_layout(x: torch.Tensor, cu_seqlens: torch.Tensor | None, chunk_size: int | None) -> ChunkLayout:
    """Return the layout of ``x [B, T, ...]``, packed or not, in chunks of :func:`power_of_two_chunks`."""
    lengths = sequence_lengths(x.shape[0], x.shape[1], cu_seqlens)
    return chunk_layout(lengths, power_of_two_chunks(lengths, chunk_size), x.device)


def at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    """Return a tensor in fp32, or in float64 as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def reverse_cumsum(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Return, for every place along a dimension, the sum from there to the end."""
    return x.flip(dim).cumsum(dim=dim).flip(dim)


def causal_decay(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Return ``exp(b_t - b_u)`` for ``u <= t``, else 0, ``[..., C, C]``.

    Args:
        rows: ``[..., C, 1]`` cumulative log decays ``b``.
        columns: The same, ``[..., 1, C]``.
    """
    difference = rows - columns
    later = torch.ones(difference.shape[-2:], dtype=torch.bool, device=difference.device).triu(1)
    return difference.masked_fill(later, -torch.inf).exp()
