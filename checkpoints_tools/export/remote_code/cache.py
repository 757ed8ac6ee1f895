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

    def to(self, device: Any, non_blocking: bool = False) -> Tokens:
        """Return a copy on another device; accelerate moves the arguments of layers that are spread over devices."""
        keep = None if self.keep is None else self.keep.to(device, non_blocking=non_blocking)
        return Tokens(keep=keep, positions=self.positions.to(device, non_blocking=non_blocking))


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
    """Return the one memory that a call was given, under whatever name, or None.

    Raises:
        ValueError: It is another model's.
    """
    memory = next((memory for memory in memories if memory is not None), None)
    if memory is not None and not isinstance(memory, StateXCache):
        raise ValueError(f"the cache is a {type(memory).__name__}; this model has a StateXCache, which it makes itself")
    return memory


def check_fit(hidden: torch.Tensor, attention_mask: torch.Tensor | None, memory: StateXCache) -> None:
    """Raise unless mask and memory are of the tokens ``hidden [B, T, hidden]``.

    Raises:
        ValueError: They are not, or there are no tokens.
    """
    batch, num_tokens = hidden.shape[:2]
    if not batch * num_tokens:
        raise ValueError(f"there are no tokens: the input has {batch} rows of {num_tokens}")
    if memory.text_tokens is not None and len(memory.text_tokens) != batch:
        raise ValueError(f"the cache is of {len(memory.text_tokens)} rows, the input of {batch}")
    if attention_mask is None:
        return
    allowed = sorted({num_tokens, memory.seen_tokens + num_tokens})
    if tuple(attention_mask.shape) not in [(batch, length) for length in allowed]:
        shapes = " or ".join(f"[{batch}, {length}]" for length in allowed)
        raise ValueError(f"attention_mask has shape {list(attention_mask.shape)}; these tokens need {shapes}")


def check_padding(keep: torch.Tensor | None, memory: StateXCache, *, needs_state: bool) -> bool:
    """Return whether a text ends in padding, where it may.

    Args:
        keep: ``[B, T]``, false for padding; None where there is none.
        memory: What was read before.
        needs_state: Whether the state after the tokens, which must be those of texts, is used.

    Raises:
        ValueError: There is padding inside of a text, or at its end though the state is used.
    """
    if keep is None:
        return False
    before = torch.zeros_like(keep[:, :1]) if memory.text_tokens is None else memory.text_tokens.unsqueeze(1) > 0
    begun = (keep.cumsum(1) > 0) | before.to(keep.device)
    behind = begun & ~keep
    if bool((keep & (behind.cumsum(1) > 0)).any()):
        raise ValueError("attention_mask has padding inside of a text; pad on the left")
    ends_in_padding = bool(behind.any())
    if ends_in_padding and needs_state:
        raise ValueError("attention_mask has padding behind a text, whose state would be lost; pad on the left")
    return ends_in_padding
