"""Recurrences over chunks, all sequences at once; and long runs of chunks in groups, of which each holds wide tensors.

Chunks are ordered by their position within their sequence, and at each position by the sequences' rank, longest first.
The sequences still running at a position are then a prefix, and consecutive positions a slice of the chunks. So a body
that makes large tensors of small inputs can run over one group of positions after another, with the states carried
between them. Where gradients are wanted, the backward pass computes each group again from its inputs and its states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

GROUP_BYTES = 1 << 25
"""Of the wide inputs and chunk states that a group of chunks, or a block of tokens, makes in one pass."""

Body = Callable[..., tuple[list[torch.Tensor], list[torch.Tensor]]]
"""Takes a :class:`ChunkRun`, its chunks ``[num_chunks, ...]`` and the states ``[S, ...]`` before them, by rank; returns
outputs ``[num_chunks, ...]`` and the states after them.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkRun:
    """The chunks of some sequences at consecutive positions.

    Attributes:
        active: Number of sequences that have a chunk at the first position, the next, ...
    """

    active: tuple[int, ...]

    def scan(
        self,
        step: Callable[..., tuple[Sequence[torch.Tensor], torch.Tensor]],
        states: Sequence[torch.Tensor],
        *per_chunk: torch.Tensor,
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """Run a recurrence over the chunks of every sequence, all sequences at once.

        Args:
            step: Called with the states of the running sequences and their chunks' slices of ``per_chunk``; returns
                the states after these chunks and an output per chunk.
            states: Tensors ``[S, ...]``, by rank.
            per_chunk: Tensors ``[num_chunks, ...]``.

        Returns:
            The outputs ``[num_chunks, ...]`` (None without chunks) and the states ``[S, ...]`` at the end, by rank.
        """
        outputs: list[torch.Tensor] = []
        ended: list[Sequence[torch.Tensor]] = []
        sizes = list(self.active)
        for count, *slices in zip(sizes, *(x.split(sizes) for x in per_chunk), strict=True):
            if count < len(states[0]):
                ended.append([x[count:] for x in states])
                states = [x[:count] for x in states]
            states, output = step(states, *slices)
            outputs.append(output)
        return (torch.cat(outputs) if outputs else None), _by_rank([*ended, states])

    def carry(
        self, decay: torch.Tensor, update: torch.Tensor, state: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run ``S <- decay * S + update`` over the chunks of every sequence.

        Args:
            decay: Per chunk ``[num_chunks, ...]``, broadcastable to ``update``.
            update: Per chunk ``[num_chunks, ...state]``.
            state: ``[S, ...state]``, by rank.

        Returns:
            The state at the start of each chunk ``[num_chunks, ...state]`` and those at the end ``[S, ...state]``.
        """
        starts, final = self.scan(lambda S, d, u: ([torch.addcmul(u, S[0], d)], S[0]), [state], decay, update)
        return (starts if starts is not None else update), final[0]

    def groups(self, most: int) -> list[ChunkRun]:
        """Cut the positions into groups of at most ``most`` chunks, or of one position.

        A chunk is not left alone: batched products of one chunk may take its tensors by other strides, and sum in
        another order, than those of several.
        """
        groups: list[list[int]] = []
        for count in self.active:
            if not groups or 1 < sum(groups[-1]) > most - count:
                groups.append([])
            groups[-1].append(count)
        if len(groups) > 1 and groups[-1] == [1]:
            groups[-2:] = [[*groups[-2], 1]]
        return [ChunkRun(active=tuple(group)) for group in groups]

    def run(
        self, body: Body, chunks: Sequence[torch.Tensor], states: Sequence[torch.Tensor], chunk_bytes: int | None = None
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Run a body over all chunks, or over groups of them, one after the other.

        Args:
            body: Returns outputs ``[num_chunks, ...]`` and the states after its chunks.
            chunks: Tensors ``[num_chunks, ...]``.
            states: Tensors ``[S, ...]`` before the first chunks, by rank.
            chunk_bytes: Of the tensors that the body makes of a chunk; a group has :data:`GROUP_BYTES` of them. None
                for one group.

        Returns:
            The outputs ``[num_chunks, ...]`` and the states ``[S, ...]`` at the end, by rank.
        """
        groups = [self] if chunk_bytes is None else self.groups(max(1, GROUP_BYTES // max(1, chunk_bytes)))
        if len(groups) <= 1:
            return body(self, chunks, states)
        outputs: list[list[torch.Tensor]] = []
        ended: list[Sequence[torch.Tensor]] = []
        sizes = [sum(group.active) for group in groups]
        for group, *slices in zip(groups, *(x.split(sizes) for x in chunks), strict=True):
            count = group.active[0]
            if count < len(states[0]):
                ended.append([x[count:] for x in states])
                states = [x[:count] for x in states]
            part, states = recomputed(body, group, slices, states)
            outputs.append(part)
        return [torch.cat(parts) for parts in zip(*outputs, strict=True)], _by_rank([*ended, states])


def _by_rank(ended: Sequence[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
    """Return states ``[S, ...]`` by rank from those of the sequences that ended at each position: the last first."""
    return [torch.cat(parts[::-1]) for parts in zip(*ended, strict=True)]


def recomputed(body: Callable[..., Any], *arguments: Any) -> Any:
    """Call a deterministic function; where gradients are wanted, its inputs alone are kept for the backward pass."""
    if not torch.is_grad_enabled():
        return body(*arguments)
    return checkpoint(body, *arguments, use_reentrant=False, preserve_rng_state=False)


def in_token_blocks(
    body: Callable[..., torch.Tensor], tensors: Sequence[torch.Tensor], bytes_per_token: int
) -> list[torch.Tensor]:
    """Return a body's results for consecutive blocks of the tokens of ``tensors [B, T, ...]``.

    Args:
        body: Takes a block of each tensor.
        tensors: Inputs of the same number of tokens.
        bytes_per_token: Of the tensors that the body makes; a block has :data:`GROUP_BYTES` of them, but at least one
            token.
    """
    size = max(1, GROUP_BYTES // max(1, bytes_per_token))
    blocks = list(zip(*(x.split(size, dim=1) for x in tensors), strict=True))
    return [body(*block) if len(blocks) == 1 else recomputed(body, *block) for block in blocks]
