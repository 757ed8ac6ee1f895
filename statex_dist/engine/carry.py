"""Recurrent states that go from the end of one packed sequence to the begin of the next (truncated BPTT).

The loader puts what goes on after a cut into the same lane of the next step: the same place in the global batch. The
state there is taken over as a value; no gradient flows through it.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from statex_dist.data.types import PackedBatch

logger = logging.getLogger(__name__)

LaneStates = list[tuple[torch.Tensor, ...]]


class CarriedStates:
    """The states that wait at the ends of this rank's lanes."""

    def __init__(self) -> None:
        self._lanes: dict[int, LaneStates] = {}

    def forward_loss(self, model: nn.Module, batch: PackedBatch, lane: int) -> torch.Tensor:
        """Return the summed cross entropy of ``batch``; take over and keep the lane's state as the batch says.

        Args:
            model: Its forward takes the fields of a batch and returns an object with ``loss_sum`` and ``states``.
            batch: On the model's device.
            lane: Place of the batch in the global batch.
        """
        states = None
        kept = self._lanes.pop(lane, None)
        if batch.carried and kept is None:
            logger.warning("no state was kept for lane %d: its document goes on from an empty one", lane)
        elif batch.carried and kept is not None:
            states = _first_of(kept, len(batch.cu_seqlens) - 1, batch.input_ids.device)
        output = model(
            batch.input_ids,
            labels=batch.labels,
            cu_seqlens=batch.cu_seqlens,
            seq_idx=batch.seq_idx,
            states=states,
            output_states=batch.goes_on,
        )
        if batch.goes_on:
            # A document that goes on fills its pack to the end, so its state is the last one.
            self._lanes[lane] = [tuple(part[-1:].detach().clone() for part in layer) for layer in output.states]
        return output.loss_sum

    def state_dict(self) -> dict[str, Any]:
        """Return the states by lane, on the CPU; empty where nothing waits."""
        return {str(lane): [tuple(p.cpu() for p in layer) for layer in layers] for lane, layers in self._lanes.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self._lanes = {int(lane): [tuple(layer) for layer in layers] for lane, layers in state.items()}


def _first_of(kept: LaneStates, sequences: int, device: torch.device) -> LaneStates:
    """States of a pack's ``sequences``: the kept one for the first, empty ones for the others."""
    return [
        tuple(
            torch.cat([part.to(device), part.new_zeros((sequences - 1, *part.shape[1:]), device=device)])
            for part in layer
        )
        for layer in kept
    ]
