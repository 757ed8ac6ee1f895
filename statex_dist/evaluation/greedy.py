"""Greedy continuations of prompts of equal length: tokens alone, whatever the tokenizer."""

from __future__ import annotations

from collections.abc import Callable

import torch

from statex_dist.inference.prefill import DEFAULT_SEGMENT_LENGTH, prefill
from statex_dist.models.lm import RecurrentLM

Stop = Callable[[int, list[int]], bool]
"""Says whether a row needs no more tokens, given its index and what it has produced."""


def decode_greedily(
    model: RecurrentLM,
    input_ids: torch.Tensor,
    num_tokens: int,
    *,
    segment_length: int = DEFAULT_SEGMENT_LENGTH,
    stop: Stop | None = None,
) -> torch.Tensor:
    """Continue prompts with the most likely tokens, one recurrent step each.

    Args:
        model: The model.
        input_ids: ``[B, T]`` int64 prompts of equal length.
        num_tokens: Tokens to produce.
        segment_length: Tokens per forward pass while the prompt is read.
        stop: Asked after each step about each row that it has not yet stopped; when all are, decoding ends.

    Returns:
        ``[B, n]`` int64, ``n <= num_tokens``; a row that was stopped before others holds further tokens behind.

    Raises:
        CheckpointError: The logits are not finite; layer and position are named.
    """
    length = input_ids.shape[1]
    logits, states = prefill(model, input_ids, segment_length=segment_length)
    produced = logits.argmax(dim=-1)[:, None]
    running = list(range(len(input_ids)))
    while produced.shape[1] < num_tokens:
        if stop is not None:
            texts = produced.tolist()
            running = [row for row in running if not stop(row, texts[row])]
            if not running:
                break
        logits, states = prefill(model, produced[:, -1:], states=states, position=length + produced.shape[1] - 1)
        produced = torch.cat([produced, logits.argmax(dim=-1)[:, None]], dim=1)
    return produced
