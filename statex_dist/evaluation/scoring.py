"""Scoring continuations of contexts of any length, in batches of unequal rows.

Several continuations of one context start from copies of its one state. Memory depends on the batch, the segment and
the states, not on how long a context is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from statex_dist.errors import DataError
from statex_dist.inference.prefill import (
    DEFAULT_SEGMENT_LENGTH,
    Tokens,
    evaluating,
    explain_row,
    prefill,
    read_contexts,
    rows_that_fit,
)
from statex_dist.inference.rows import take_rows
from statex_dist.inference.vocabulary import check_token_ids
from statex_dist.models.core.sequences import LayerState
from statex_dist.models.lm import RecurrentLM


@dataclass(frozen=True, slots=True)
class Score:
    """A model's score of a continuation.

    Attributes:
        logprob: Sum of the tokens' log-probabilities, in nats.
        is_greedy: Whether each token is the most likely one.
    """

    logprob: float
    is_greedy: bool


def score_continuations(
    model: RecurrentLM,
    requests: Sequence[tuple[Tokens, Tokens]],
    *,
    batch_size: int,
    segment_length: int,
    start: Sequence[LayerState] | None = None,
    position: int = 0,
) -> Iterator[tuple[int, Score]]:
    """Yield each request's number and score, in the order in which they are done.

    Args:
        model: The model, fp32 where the figures are to be compared.
        requests: ``(context, continuation)``, one token or more each; a context that occurs again is read once.
        batch_size: Rows per forward pass, fewer where the logits would take too much memory.
        segment_length: Most tokens per forward pass.
        start: Each layer's state ``[1, ...]`` before every context, left as it is, or None for zero.
        position: Position of a context's first token, for messages.

    Raises:
        DataError: A context or continuation is empty, or a token is outside the model's vocabulary.
        CheckpointError: The model's output is not finite; layer and position are named.
    """
    for number, (context, continuation) in enumerate(requests):
        if not len(context) or not len(continuation):
            empty = "continuation" if len(context) else "context"
            raise DataError(f"request {number} has an empty {empty}; there is nothing to score")
    check_token_ids([tokens for request in requests for tokens in request], model.config.vocab_size)
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, (context, _) in enumerate(requests):
        groups.setdefault(tuple(context), []).append(number)
    # Rows of like length share the most forward passes. The longest rows run first: if they exceed the memory, the run
    # fails at its start.
    contexts = sorted(groups, key=len, reverse=True)
    with evaluating(model):
        for first in range(0, len(contexts), batch_size):
            batch = contexts[first : first + batch_size]
            logits, states = read_contexts(model, batch, segment_length=segment_length, start=start, position=position)
            rows = [(row, number) for row, context in enumerate(batch) for number in groups[context]]
            rows.sort(key=lambda pair: len(requests[pair[1]][1]), reverse=True)
            while rows:
                width = min(segment_length, len(requests[rows[0][1]][1]))
                size = rows_that_fit(model, width, batch_size)
                part, rows = rows[:size], rows[size:]
                which = [row for row, _ in part]
                wanted = [requests[number][1] for _, number in part]
                positions = [position + len(batch[row]) for row in which]
                scores = _score_rows(model, logits[which], take_rows(states, which), wanted, positions, segment_length)
                yield from zip((number for _, number in part), scores, strict=True)


def _score_rows(
    model: RecurrentLM,
    logits: torch.Tensor,
    states: list[LayerState],
    wanted: list[Tokens],
    positions: list[int],
    segment_length: int,
) -> list[Score]:
    """Score one continuation a row, the longest first, from the logits and states of their contexts.

    ``positions`` are those of the continuations' first tokens.
    """
    device = logits.device
    first = torch.tensor([tokens[0] for tokens in wanted], device=device)
    sums, greedy = _score_tokens(logits[:, None], first[:, None], torch.ones_like(first)[:, None].bool())
    at, active = 0, len(wanted)
    while True:
        # A row whose targets are all scored needs no further token.
        while active and len(wanted[active - 1]) - 1 <= at:
            active -= 1
        if not active:
            break
        end = min(at + segment_length, len(wanted[0]) - 1)
        # Filled up on the right: a causal model's scores do not see it, and the row's state is not used again.
        tokens = np.zeros((active, end - at + 1), np.int64)
        for row in range(active):
            piece = wanted[row][at : end + 1]
            tokens[row, : len(piece)] = piece
        lengths = torch.tensor([len(wanted[row]) - 1 - at for row in range(active)], device=device)
        ids = torch.as_tensor(tokens, device=device)
        before = take_rows(states, slice(active))
        output = model(ids[:, :-1], states=before, output_states=True)
        counted = torch.arange(end - at, device=device) < lengths[:, None]
        bad = (~torch.isfinite(output.logits).all(dim=-1) & counted).any(dim=1)
        if bad.any():
            raise explain_row(model, ids[:, :-1], before, bad, [first + at for first in positions[:active]])
        part, is_greedy = _score_tokens(output.logits, ids[:, 1:], counted)
        sums[:active] += part
        greedy[:active] &= is_greedy
        at, states = end, output.states
    return [Score(logprob, is_greedy) for logprob, is_greedy in zip(sums.tolist(), greedy.tolist(), strict=True)]


def _score_tokens(
    logits: torch.Tensor, targets: torch.Tensor, counted: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the targets' summed log-probability ``[B]`` float64, and whether each is the most likely, ``[B]``."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logprobs = wide.gather(-1, targets[..., None])[..., 0] - wide.logsumexp(dim=-1)
    sums = torch.where(counted, logprobs, 0).double().sum(dim=1)
    return sums, ((wide.argmax(dim=-1) == targets) | ~counted).all(dim=1)


Stop = Callable[[int, list[int]], bool]
"""Returns whether a row needs no more tokens, from its index and its tokens so far."""


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
