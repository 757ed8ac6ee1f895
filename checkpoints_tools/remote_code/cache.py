"""The model's memory between calls: a constant number of bytes, however many tokens it has read."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

CACHE_NAME = next(f.name for f in fields(CausalLMOutputWithPast) if f.name in ("cache", "past_key_values"))
"""What this release of transformers calls the memory in outputs and keyword arguments."""

LayerState = tuple[torch.Tensor, ...]
"""State of one layer, ``[B, ...]`` each: the recurrent matrices, then the convolutions' last inputs."""


@dataclass
class Tokens:
    """What the layers need to know of the tokens that they are given.

    Attributes:
        keep: ``[B, T]``, false for padding; None where there is none.
        positions: ``[B, T]`` position of each token in its text, padding not counted.
    """

    keep: torch.Tensor | None
    positions: torch.Tensor


class StateXCache:
    """States of all layers after the tokens read so far; ``forward`` replaces them in place.

    Attributes:
        layers: Each layer's state; None before the first token.
        seen_tokens: Tokens read so far, padding included.
        text_tokens: ``[B]`` tokens of each text read so far, without padding; None before the first.
    """

    is_compileable = False
    is_croppable = False
    is_linear = (False,)  # in transformers 5 said of memories that do not count what they have read; this one does

    def __init__(self, num_layers: int):
        self.layers: list[LayerState | None] = [None] * num_layers
        self.seen_tokens = 0
        self.text_tokens: torch.Tensor | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens read so far."""
        return self.seen_tokens

    def get_max_cache_shape(self) -> int:
        """Return -1: there is no longest text."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.layers = [None] * len(self.layers)
        self.seen_tokens, self.text_tokens = 0, None

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows of the batch, in this order."""
        self._map(lambda x: x.index_select(0, indices.to(x.device)))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Give each beam the states of the beam that it goes on from."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def _map(self, function: Any) -> None:
        self.layers = [None if state is None else tuple(map(function, state)) for state in self.layers]
        if self.text_tokens is not None:
            self.text_tokens = function(self.text_tokens)


def given_memory(*memories: StateXCache | None) -> StateXCache | None:
    """Return the one memory that a call was given, under whatever name, or None."""
    return next((memory for memory in memories if memory is not None), None)
