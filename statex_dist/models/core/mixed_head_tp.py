"""A mixed layer of which a rank has only some value heads: it runs one plain head for each partner of a value head.

In a mixed layer (:mod:`statex_dist.ops.head_mixing`) output head ``j`` reads
``o_j = sum_s M[j-s, s] q_{j-s} S_{j-s, s}``,
and ``S_{j-s, s}`` holds the values of head ``j`` alone. A rank that has the values of some heads and the keys of all
can therefore run the pairs ``(j, s)`` as separate heads, each with the keys and decays of head ``j - s`` and the values
of ``j``. The number of state elements is the same, and the rank needs no values of other ranks.
"""

from __future__ import annotations

from functools import cache

import torch

from statex_dist.models.layout import HeldHeads


class PartnerHeads:
    """The pairs ``(j, s)`` of a mixed layer's value heads and partners, ordered by ``j``.

    Args:
        heads: The part of the layer that this rank has.
    """

    def __init__(self, heads: HeldHeads):
        self.heads = heads

    @classmethod
    def where_needed(cls, heads: HeldHeads) -> PartnerHeads | None:
        """Return the pairs of a mixed layer of which this rank has only a part, else None."""
        return cls(heads) if heads.partners > 1 and not heads.all_here else None

    def inputs(self, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Return a scan's inputs ``q, k, v, ...`` for the pairs; all but the values belong to keys."""
        q, k, v, *rest = inputs
        return (self.by_key(q), self.by_key(k), self.by_value(v), *(self.by_key(y) for y in rest))

    def by_key(self, y: torch.Tensor) -> torch.Tensor:
        """Return ``[B, T, pairs, ...]`` from the keys or decays of all heads, ``[B, T, H, ...]``."""
        indices = _key_heads(self.heads, y.device)
        return y.index_select(2, indices // (self.heads.total // y.shape[2]))

    def by_value(self, v: torch.Tensor) -> torch.Tensor:
        """Return ``[B, T, pairs, V]`` from the values ``[B, T, h, V]`` that are here."""
        return v.repeat_interleave(self.heads.partners, dim=2)

    def read(self, o: torch.Tensor, mix: torch.Tensor) -> torch.Tensor:
        """Return outputs ``[B, T, h, V]`` from those of the pairs, read with ``mix [H, r]``."""
        partners = self.heads.partners
        rows = _key_heads(self.heads, mix.device).view(-1, partners)
        weights = mix.to(o.dtype)[rows, torch.arange(partners, device=mix.device)]
        return (o.unflatten(2, (-1, partners)) * weights.unsqueeze(-1)).sum(3)


@cache
def _key_heads(heads: HeldHeads, device: torch.device) -> torch.Tensor:
    """Return ``[pairs]``: the head whose keys each pair reads."""
    pairs = [(heads.first + j - s) % heads.total for j in range(heads.values) for s in range(heads.partners)]
    return torch.tensor(pairs, device=device)
