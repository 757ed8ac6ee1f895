"""State passing: sequences that begin from the state at another sequence's end (arXiv 2507.02782, section 4).

A model trained from empty states alone sees, on a longer text, states that it has never met. Beginning some sequences
where an unrelated one ended shows them to it, at no more tokens: states then hold what many sequences left behind.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from statex_dist.batch import IGNORE_INDEX, PackedBatch

States = list[tuple[torch.Tensor, ...]]


class StatePassing:
    """Keeps one state of this rank, and gives it to sequences by chance.

    What is kept is the state at the end of one sequence, drawn from those that ended in what was run last, a pack or a
    segment of one; sequences that begin in the next begin from it or from an empty state, each drawn on its own.
    Convolutions' tails are passed on with the state. No gradient flows through it.

    Args:
        probability: Of a sequence to begin from the kept state.
        seed: Of the draws; they depend on it, the lane and the number of packs before.
    """

    def __init__(self, probability: float, seed: int) -> None:
        self.probability, self.seed = probability, seed
        self._packs = 0
        self._kept: States | None = None

    def give(self, batch: PackedBatch, lane: int, states: States | None, device: torch.device) -> States | None:
        """Return the states before the sequences of ``batch``, ``[S, ...]`` each.

        Args:
            batch: A pack or a segment of one.
            lane: Place of the pack in the global batch.
            states: The states before them so far; a first sequence that goes on keeps its own. None for empty ones.
            device: Where the states are needed.
        """
        count = len(batch.cu_seqlens) - 1
        drawn = self._draw(lane).random(count) < self.probability
        drawn[0] &= not batch.carried
        if self._kept is None or not drawn.any():
            return states
        chosen = torch.from_numpy(drawn).to(device)
        before = states or [tuple(p.new_zeros((count, *p.shape[1:]), device=device) for p in x) for x in self._kept]
        return [
            tuple(
                torch.where(chosen.view(-1, *[1] * (part.dim() - 1)), kept.to(device), part)
                for kept, part in zip(layer, parts, strict=True)
            )
            for layer, parts in zip(self._kept, before, strict=True)
        ]

    def keep(self, batch: PackedBatch, lane: int, states: States) -> None:
        """Keep the state at the end of one of the sequences of ``batch``, of which anything is learned and which end.

        Args:
            batch: What was run.
            lane: As for :meth:`give`.
            states: The states after its sequences, ``[S, ...]`` each.
        """
        learned = torch.unique(batch.seq_idx[batch.labels != IGNORE_INDEX]).tolist()
        ended = [place for place in learned if not batch.continues or place < len(batch.cu_seqlens) - 2]
        if ended:
            place = int(self._draw(lane, 1).choice(ended))
            self._kept = [tuple(part[place : place + 1].detach().clone() for part in layer) for layer in states]
        self._packs += 1

    def _draw(self, lane: int, *purpose: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(np.random.SeedSequence((self.seed, lane, self._packs, *purpose))))

    def forget(self) -> None:
        """Drop the kept state."""
        self._kept = None

    def state_dict(self) -> dict[str, Any]:
        """Return what the next pack needs, on the CPU."""
        return {"packs": self._packs, "kept": self._kept and [tuple(p.cpu() for p in layer) for layer in self._kept]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self._packs = state["packs"]
        self._kept = state["kept"] and [tuple(layer) for layer in state["kept"]]
