"""Context parallelism: one packed sequence split over several ranks that hand their recurrent states on.

A linear recurrence maps the state before a share of the tokens to the state after it by ``S -> D S + F``, where ``D``
(the total decay) and ``F`` (the state from an empty start) are known without the state before. So all ranks scan at
once, exchange ``D`` and ``F``, and each adds what the true state before its share contributes (docs/method.md, section
3). What crosses ranks is one state per layer, however long the sequence is.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from statex_dist.errors import ConfigError


@dataclass(kw_only=True)
class ParallelConfig:
    """How ranks share the work beside ZeRO's partitions.

    Attributes:
        context: Ranks that share each packed sequence; the number of ranks must be a multiple.
    """

    context: int = 1

    def __post_init__(self) -> None:
        if self.context < 1:
            raise ConfigError(f"parallel.context must be 1 or more, not {self.context}")

    def lies_within_hosts(self, local_world_size: int, world_size: int) -> bool:
        """Return whether no context group has ranks on two hosts, each of which runs ``local_world_size`` ranks."""
        return local_world_size >= world_size or local_world_size % self.context == 0

    def data_parallel_size(self, world_size: int) -> int:
        """Return the groups of ranks that get packs of their own.

        Raises:
            ConfigError: The ranks do not divide into context groups.
        """
        if world_size % self.context:
            raise ConfigError(f"parallel.context={self.context} does not divide the {world_size} ranks of this run")
        return world_size // self.context


@dataclass(frozen=True, kw_only=True, slots=True)
class ContextGroup:
    """The ranks that share one packed sequence, in the order of its tokens.

    Attributes:
        rank: Place of this process among them.
        size: How many they are.
        group: torch's process group.
    """

    rank: int
    size: int
    group: Any

    @classmethod
    def join(cls, size: int, *, timeout: timedelta) -> ContextGroup | None:
        """Divide the ranks of the world into groups of ``size`` neighbours; None where each rank is its own.

        Args:
            size: Ranks of a group.
            timeout: After which an exchange gives up on a dead peer.
        """
        if size == 1:
            return None
        group, _ = dist.new_subgroups(group_size=size, timeout=timeout)
        return cls(rank=dist.get_rank() % size, size=size, group=group)

    def share(self, num_tokens: int) -> tuple[int, int]:
        """Return the first token of this rank's share of a sequence, and the first one after it."""
        return self.rank * num_tokens // self.size, (self.rank + 1) * num_tokens // self.size

    def all_gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return every rank's ``x``, by rank; no gradient flows."""
        x = x.contiguous()
        gathered = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(gathered, x, group=self.group)
        return gathered


@dataclass(frozen=True, kw_only=True, slots=True)
class ContextShare:
    """How the sequences of this rank's share of a pack continue in the neighbouring shares.

    Attributes:
        group: The ranks that hold the other shares.
        opens: Whether the share's first sequence began before it.
        passes: Whether the share lies within one sequence that began before it; the incoming state then
            also reaches the next share.
        first_tokens: Number of tokens that the incoming state reaches: the tokens of a first sequence that began
            before the share, else 1, so that every rank takes part in the backward exchange.
    """

    group: ContextGroup
    opens: bool
    passes: bool
    first_tokens: int

    @classmethod
    def of(cls, group: ContextGroup, *, cu_seqlens: torch.Tensor, opens: bool) -> ContextShare:
        """Describe a share by the borders ``[S + 1]`` of its sequences."""
        return cls(
            group=group,
            opens=opens,
            passes=opens and len(cu_seqlens) == 2,
            first_tokens=int(cu_seqlens[1]) if opens else 1,
        )

    def exchange(
        self, final: torch.Tensor, decay: torch.Tensor | None, initial: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the state before this share and the one after the last share of the group.

        Every rank must call this, forward and backward, in the same order.

        Args:
            final: ``[1, ...]`` the state after the share's last sequence, had it begun in this share from zero.
            decay: What the share multiplies an incoming state by: factors ``[1, ..., 1]`` broadcastable to ``final``,
                or matrices ``[1, ..., K, K]`` on ``final [1, ..., K, V]``. None where nothing of it is left (a
                convolution's inputs).
            initial: The state before the first share, or None for zero; the same on every rank. No gradient flows.

        Returns:
            The state before this share, zero where its first sequence begins in it; and the state after the group's
            last token, which carries no gradient.
        """
        if decay is None:
            decay = final.new_zeros((1,) * final.dim())
        before, after = _Exchange.apply(final, decay if self.passes else decay * 0, initial, self)
        return before, after


class _Exchange(torch.autograd.Function):
    """``h[r + 1] = F[r] + D[r] h[r]`` over the ranks; rank ``r`` gets ``h[r]``.

    Backward the adjoint goes the other way: ``a[r] = G[r] + D[r]^T a[r + 1]``, with ``G[r]`` the gradient of what rank
    ``r`` got; then ``dF[r] = a[r + 1]`` and ``dD[r] = a[r + 1] h[r]^T``.
    """

    @staticmethod
    def forward(ctx, final: torch.Tensor, decay: torch.Tensor, initial: torch.Tensor | None, share: ContextShare):
        group = share.group
        finals, decays = group.all_gather(final), group.all_gather(decay)
        ctx.matrix = decay.shape[-1] > 1
        state = torch.zeros_like(final) if initial is None else initial.to(final)
        before = state
        for rank in range(group.size):
            if rank == group.rank:
                before = state
            state = finals[rank] + _times(decays[rank], state, matrix=ctx.matrix)
        ctx.share = share
        ctx.save_for_backward(before, *decays)
        ctx.mark_non_differentiable(state)
        return (before.clone() if share.opens else torch.zeros_like(before)), state

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor, _):
        share, (before, *decays) = ctx.share, ctx.saved_tensors
        grads = share.group.all_gather(grad if share.opens else torch.zeros_like(grad))
        adjoint = torch.zeros_like(grad)
        for rank in range(share.group.size - 1, share.group.rank, -1):
            transposed = decays[rank].transpose(-1, -2) if ctx.matrix else decays[rank]
            adjoint = grads[rank] + _times(transposed, adjoint, matrix=ctx.matrix)
        mine = decays[share.group.rank]
        if ctx.matrix:
            grad_decay = adjoint @ before.transpose(-1, -2)
        else:
            grad_decay = (adjoint * before).sum_to_size(mine.shape)
        return adjoint, grad_decay, None, None


def _times(decay: torch.Tensor, state: torch.Tensor, *, matrix: bool) -> torch.Tensor:
    return decay @ state if matrix else decay * state
