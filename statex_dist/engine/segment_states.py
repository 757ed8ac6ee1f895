"""A pack's forward pass: its segments one after another, its share of a context group, and the states between them.

States go from the end of one segment or packed sequence to the begin of the next (truncated BPTT). The loader puts the
rest of a cut document into the same lane of the next step, that is, the same place in the global batch. That step takes
the state over as a value; no gradient flows through it. With state passing, a sequence may begin from the final state
of an unrelated one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

from statex_dist.batch import IGNORE_INDEX, PackedBatch
from statex_dist.distributed.context_group import ContextGroup, ContextShare
from statex_dist.ops.attention import KeyValues

logger = logging.getLogger(__name__)

LaneStates = list[tuple[torch.Tensor, ...]]
_PASSING = "passing"


class StatePassing:
    """Keeps one state of this rank, and gives it to sequences by chance (arXiv 2507.02782, section 4).

    A model trained from empty states alone sees, on a longer text, states that it has never met. Beginning some
    sequences where an unrelated one ended shows them to it, at no more tokens: states then hold what many sequences
    left behind.

    The kept state is that at the end of one sequence, drawn from those that ended in the last pack or segment of one;
    sequences that begin in the next begin from it or from an empty state, each drawn on its own. Convolutions' tails
    are passed on with the state. No gradient flows through it.

    Args:
        probability: Of a sequence to begin from the kept state.
        seed: Of the draws; they depend on it, the lane and the number of packs before.
    """

    def __init__(self, probability: float, seed: int) -> None:
        self.probability, self.seed = probability, seed
        self._packs = 0
        self._kept: LaneStates | None = None

    def give(self, batch: PackedBatch, lane: int, states: LaneStates | None, device: torch.device) -> LaneStates | None:
        """Return the states before the sequences of ``batch``, ``[S, ...]`` each.

        Args:
            batch: A pack or a segment of one.
            lane: Place of the pack in the global batch.
            states: The states before them so far; a first sequence that continues keeps its own. None for empty ones.
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

    def keep(self, batch: PackedBatch, lane: int, states: LaneStates) -> None:
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


class CarriedStates:
    """The states that wait at the ends of this rank's lanes.

    Args:
        context: The ranks that share each pack, or None. All of them keep the state at its end.
        passing: Gives other sequences' states to those that would begin from zero, or None. Not with ``context``.
    """

    def __init__(self, context: ContextGroup | None = None, passing: StatePassing | None = None) -> None:
        assert context is None or passing is None, "the configuration refuses it"
        self.context, self.passing = context, passing
        self._lanes: dict[int, LaneStates] = {}
        self.router_loss: torch.Tensor | None = None
        """Load-balancing loss of the last forward pass; see :class:`statex_dist.models.lm.LMOutput`."""
        self.observed: list[torch.Tensor] | None = None
        """Mean squares of each layer's state after the last document, where they were asked for and are known."""

    def forward_loss(
        self, model: nn.Module, batch: PackedBatch, lane: int, device: torch.device, *, observe: bool = False
    ) -> torch.Tensor:
        """Return the summed cross entropy of this rank's share of ``batch``; take over and keep the lane's state.

        Args:
            model: Its forward takes the fields of a batch and returns an object with ``loss_sum`` and ``states``.
            batch: A pack or a segment of one, whole.
            lane: Place of the pack in the global batch.
            device: Where the model computes.
            observe: Whether to measure the states at the end.
        """
        share, context = batch, None
        if self.context is not None:
            share = batch.slice(*self.context.share(batch.num_tokens))
            context = ContextShare.of(self.context, cu_seqlens=share.cu_seqlens, opens=share.carried)
        if observe:
            self.observed = None
        states = None
        kept = self._lanes.pop(lane, None)
        if batch.carried and kept is None:
            logger.warning("no state was kept for lane %d: its document goes on from an empty one", lane)
        elif batch.carried and kept is not None:
            states = _first_of(kept, 1 if context else len(batch.cu_seqlens) - 1, device)
        passing = None if batch.dummy else self.passing  # the state after a dummy is of no text
        if passing is not None:
            states = passing.give(batch, lane, states, device)
        place = _observed_place(batch, over_ranks=context is not None) if observe else None
        share = share.to(device)
        output = model(
            share.input_ids,
            labels=share.labels,
            cu_seqlens=share.cu_seqlens,
            seq_idx=share.seq_idx,
            states=states,
            output_states=batch.continues or place is not None or passing is not None,
            context=context,
            padding=share.padding,
        )
        self.router_loss = output.router_loss
        if batch.continues:
            # A document that continues fills its pack to the end, so its state is the last one.
            self._lanes[lane] = [
                _like(layer, (part[-1:].detach().clone() for part in layer)) for layer in output.states
            ]
        if passing is not None:
            passing.keep(batch, lane, output.states)
        if place is not None:
            whole: Any = getattr(model, "module", model)
            kinds = [kind for _, kind in whole.state_places]
            recurrent = [x[0] for x, kind in zip(output.states, kinds, strict=True) if kind == "recurrent"]
            self.observed = [state[place].detach().double().square().mean() for state in recurrent]
        return output.loss_sum

    def forget(self) -> None:
        """Drop all states, after a step whose numbers cannot be trusted."""
        self._lanes.clear()
        if self.passing is not None:
            self.passing.forget()

    def state_dict(self) -> dict[str, Any]:
        """Return the states by lane, on the CPU, with those of state passing; empty where no state waits."""
        lanes: dict[str, Any] = {}
        for lane, layers in self._lanes.items():
            lanes[str(lane)] = [tuple(part.cpu() for part in layer) for layer in layers]
        return lanes if self.passing is None else {**lanes, _PASSING: self.passing.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        lanes = {key: value for key, value in state.items() if key != _PASSING}
        self._lanes = {int(lane): [_of_saved(tuple(layer)) for layer in layers] for lane, layers in lanes.items()}
        if self.passing is not None and _PASSING in state:
            self.passing.load_state_dict(state[_PASSING])


def _observed_place(batch: PackedBatch, *, over_ranks: bool) -> int | None:
    """Return where among the states is that of the last sequence of which anything is learned; None if nowhere.

    Padding at the end is a sequence of its own; of a pack over several ranks only the state at its end is known.
    """
    learned = batch.seq_idx[batch.labels != IGNORE_INDEX]
    last = int(learned[-1]) if len(learned) else 0
    if not over_ranks:
        return last
    return 0 if last == len(batch.cu_seqlens) - 2 else None


def _first_of(kept: LaneStates, sequences: int, device: torch.device) -> LaneStates:
    """States of a pack's ``sequences``: the kept one for the first, empty ones for the others.

    Of attention the kept one alone: those for the others would be as long.
    """
    return [
        KeyValues(*(part.to(device) for part in layer))
        if isinstance(layer, KeyValues)
        else tuple(
            torch.cat([part.to(device), part.new_zeros((sequences - 1, *part.shape[1:]), device=device)])
            for part in layer
        )
        for layer in kept
    ]


def _like(layer: tuple[torch.Tensor, ...], parts: Iterable[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Return the parts of a state as a state of the same kind."""
    return KeyValues(*parts) if isinstance(layer, KeyValues) else tuple(parts)


def _of_saved(layer: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Return a saved state: of attention, where the third part counts tokens."""
    return KeyValues(*layer) if len(layer) == 3 and layer[2].dtype == torch.int64 else layer
