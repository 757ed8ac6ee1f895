"""How packed sequences are cut into chunks in the order of their tokens, and chunks into segments that bound memory.

Every sequence starts a chunk of its own, so that no chunk holds two; the places after a sequence's last token hold
zeros (a zero key and no decay change nothing). A segment is a run of chunks whose states are held at the same time.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch

from statex_dist.ops.cu_seqlens import cut_chunks, index_tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """Consecutive chunks of flat tokens.

    Attributes:
        chunk_size: Places per chunk, ``C``.
        start: ``[n]`` int64 first token of each chunk.
        length: ``[n]`` int32 tokens of each chunk.
        sequence: ``[n]`` int32 sequence of each chunk.
        is_first: ``[n]`` int32, 1 where a sequence begins with the chunk.
        is_last: ``[n]`` int32, 1 where a sequence ends with it.
        places: int64 places that hold a token, in the order of the tokens; empty where all do.
        tokens: First token and number of tokens of the segment.
    """

    chunk_size: int
    start: torch.Tensor
    length: torch.Tensor
    sequence: torch.Tensor
    is_first: torch.Tensor
    is_last: torch.Tensor
    places: torch.Tensor
    tokens: tuple[int, int]

    @property
    def num_chunks(self) -> int:
        """Chunks of the segment, ``n``."""
        return len(self.start)

    @property
    def is_full(self) -> bool:
        """Whether every place holds a token, so that tokens and places are the same memory."""
        return self.tokens[1] == self.num_chunks * self.chunk_size

    @property
    def alone(self) -> Segment:
        """The same chunks of tensors that hold the segment's tokens alone (:meth:`own`)."""
        first, count = self.tokens
        return replace(self, start=self.start - first, tokens=(0, count))

    def own(self, x: torch.Tensor) -> torch.Tensor:
        """Return the segment's part of ``x [tokens, H, D]``, a view."""
        first, count = self.tokens
        return x[first : first + count]

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``[H, n, C, D]`` from ``x [tokens, H, D]``, zero in empty places; a view of one head's full chunks."""
        first, count = self.tokens
        if self.is_full:
            placed = x[first : first + count]
        else:
            placed = x.new_zeros(self.num_chunks * self.chunk_size, *x.shape[1:])
            placed.index_copy_(0, self.places, x[first : first + count])
        return placed.unflatten(0, (self.num_chunks, self.chunk_size)).permute(2, 0, 1, 3)

    def put(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Write ``x [H, n, C, D]`` to the segment's tokens of ``out [tokens, H, D]``."""
        first, count = self.tokens
        placed = x.permute(1, 2, 0, 3).flatten(0, 1)
        out[first : first + count] = placed if self.is_full else placed.index_select(0, self.places)


@lru_cache(maxsize=64)
def cut_segments(
    lengths: tuple[int, ...], chunk_size: int, chunks_per_segment: int, device: torch.device
) -> tuple[Segment, ...]:
    """Return the segments of sequences that lie one behind the other.

    Args:
        lengths: Tokens of each sequence; 0 is allowed and gives no chunk.
        chunk_size: Tokens per chunk.
        chunks_per_segment: Most chunks of a segment.
        device: Where the index tensors live.
    """
    sequence, position, start, length = cut_chunks(lengths, chunk_size)
    is_first, is_last = position == 0, start + length == np.cumsum(np.asarray(lengths, dtype=np.int64))[sequence]

    segments = []
    for low, high in itertools.pairwise([*range(0, len(sequence), chunks_per_segment), len(sequence)]):
        offsets = np.arange(chunk_size)
        inside = (offsets < length[low:high, None]).ravel()
        places = np.zeros(0, dtype=np.int64) if inside.all() else np.flatnonzero(inside)
        segments.append(
            Segment(
                chunk_size=chunk_size,
                start=index_tensor(start[low:high], device),
                length=index_tensor(length[low:high].astype(np.int32), device),
                sequence=index_tensor(sequence[low:high].astype(np.int32), device),
                is_first=index_tensor(is_first[low:high].astype(np.int32), device),
                is_last=index_tensor(is_last[low:high].astype(np.int32), device),
                places=index_tensor(places, device),
                tokens=(int(start[low]), int(length[low:high].sum())),
            )
        )
    return tuple(segments)
