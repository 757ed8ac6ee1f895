"""Rows of a batch's states: joined, taken out and copied, with keys and values of unequal lengths.

A recurrent state has one size whatever was read. Keys and values grow with the tokens, and those of a batch are as long
as its longest row: shorter rows hold zeros in front, which nothing attends to.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F

from statex_dist.models.core.sequences import LayerState
from statex_dist.ops.attention import KeyValues


def join_rows(*parts: Sequence[LayerState]) -> list[LayerState]:
    """Return the states of the rows of several batches as one batch's."""
    return [_joined(states) for states in zip(*parts, strict=True)]


def _joined(states: Sequence[LayerState]) -> LayerState:
    """Return one layer's states side by side; keys and values are filled up in front to the longest."""
    if not isinstance(states[0], KeyValues):
        return tuple(torch.cat(tensors) for tensors in zip(*states, strict=True))
    read = [KeyValues(*state) for state in states]
    longest = max(state.keys.shape[2] for state in read)
    keys, values = (
        torch.cat([F.pad(y, (0, 0, longest - y.shape[2], 0)) for y in tensors])
        for tensors in ([state.keys for state in read], [state.values for state in read])
    )
    return KeyValues(keys, values, torch.cat([state.lengths for state in read]))


def take_rows(states: Sequence[LayerState], rows: Sequence[int] | slice | torch.Tensor) -> list[LayerState]:
    """Return the states of some rows; a row may be named more than once.

    Keys and values become as short as the longest of these rows allows.

    Args:
        states: Each layer's state ``[S, ...]``.
        rows: Places of rows, whose states are copied; or a slice, whose states may share memory with ``states``.
    """
    if not states:
        return []
    index = rows if isinstance(rows, slice) else torch.as_tensor(rows, device=states[0][0].device)
    return [_taken(state, index) for state in states]


def _taken(state: LayerState, index: slice | torch.Tensor) -> LayerState:
    if not isinstance(state, KeyValues):
        return tuple(tensor[index] for tensor in state)
    lengths = state.lengths[index]
    first = state.keys.shape[2] - int(lengths.max()) if len(lengths) else state.keys.shape[2]
    return KeyValues(state.keys[:, :, first:][index], state.values[:, :, first:][index], lengths)


def clear_rows(states: Sequence[LayerState], rows: Sequence[int]) -> list[LayerState]:
    """Return the states with some rows empty, as before a text; the tensors may be those of ``states``, changed."""
    for state in states:
        for tensor in state:
            tensor[list(rows)] = 0
    return take_rows(states, slice(None))


def state_bytes(states: Iterable[LayerState]) -> int:
    """Return the bytes of states, keys and values among them."""
    return sum(part.numel() * part.element_size() for state in states for part in state)


def key_value_bytes(states: Iterable[LayerState]) -> int:
    """Return the bytes of the keys and values among states."""
    return state_bytes(state[:2] for state in states if isinstance(state, KeyValues))
