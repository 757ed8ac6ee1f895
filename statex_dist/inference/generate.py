"""Continuations of prompts of any and unequal length, in batches, as they come or whole."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from statex_dist.data.tokenizer import Tokenizer
from statex_dist.errors import DataError
from statex_dist.inference.decoding import Agree, DecodingLoop, Progress, Row, Sampling
from statex_dist.inference.memory import rows_with_memory
from statex_dist.inference.prefill import (
    DEFAULT_SEGMENT_LENGTH,
    Tokens,
    evaluating,
    read_contexts,
    rows_that_fit,
)
from statex_dist.inference.rows import join_rows, take_rows
from statex_dist.inference.text import stop_with_special_token, text_window
from statex_dist.inference.vocabulary import check_token_ids
from statex_dist.models.core.sequences import LayerState
from statex_dist.models.lm import RecurrentLM

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Prefix:
    """A text that has been read.

    Attributes:
        logits: ``[1, vocab]`` after its last token.
        states: Each layer's state there, ``[1, ...]``.
        num_tokens: Tokens that were read.
        tokens: They, or the last of them that the text behind them depends on.
    """

    logits: torch.Tensor
    states: list[LayerState]
    num_tokens: int
    tokens: Tokens


def read_prefix(
    model: RecurrentLM, tokens: Tokens, *, segment_length: int = DEFAULT_SEGMENT_LENGTH, prefix: Prefix | None = None
) -> Prefix:
    """Read a text, behind another one where ``prefix`` is given.

    Args:
        model: The model.
        tokens: The text; it may be empty behind another one.
        segment_length: Most tokens per forward pass.
        prefix: What was read before, left as it is.

    Raises:
        DataError: There is nothing to read, or a token is outside the model's vocabulary.
        CheckpointError: The model's output is not finite; layer and position are named.
    """
    check_token_ids([tokens], model.config.vocab_size)
    if not len(tokens):
        if prefix is None:
            raise DataError("the prompt has no tokens; there is nothing to continue")
        return prefix
    start, position, before = (None, 0, ()) if prefix is None else (prefix.states, prefix.num_tokens, prefix.tokens)
    with evaluating(model):
        logits, states = read_contexts(model, [tokens], segment_length=segment_length, start=start, position=position)
    return Prefix(logits=logits, states=states, num_tokens=position + len(tokens), tokens=(*before, *tokens))


def stream_continuations(
    model: RecurrentLM,
    contexts: Sequence[Tokens],
    sampling: Sampling,
    *,
    tokenizer: Tokenizer,
    batch_size: int,
    segment_length: int = DEFAULT_SEGMENT_LENGTH,
    seeds: Sequence[int] | None = None,
    prefix: Prefix | None = None,
    agree: Agree | None = None,
) -> Iterator[Progress]:
    """Yield each step's result for each context; the key of a progress is the context's number.

    Args:
        model: The model.
        contexts: One token or more each (or none, with a prefix); a context that occurs again is read once.
        sampling: How to continue.
        tokenizer: The model's tokenizer.
        batch_size: Rows per forward pass.
        segment_length: Most tokens per forward pass.
        seeds: One seed of the random draws for each context, whatever the rest of the batch; None takes its number.
        prefix: A text that is before every context.
        agree: Makes all ranks take the same tokens, if several ranks hold parts of the model.

    Raises:
        DataError: A context is empty, or a token is outside the model's vocabulary.
        CheckpointError: The model's output is not finite; layer and position are named.
        ConfigError: The keys and values of a text do not fit into the memory that is free.
    """
    if prefix is None and any(not len(context) for context in contexts):
        raise DataError("a context is empty; there is nothing to continue")
    check_token_ids(contexts, model.config.vocab_size)
    # Rows of like length share the most forward passes. The longest rows run first: if they exceed the memory, the run
    # fails at its start.
    numbers = sorted(range(len(contexts)), key=lambda i: (-len(contexts[i]), tuple(contexts[i])))
    batch_size = rows_that_fit(model, 1, batch_size)
    before, first_tokens = (0, ()) if prefix is None else (prefix.num_tokens, text_window(tokenizer, prefix.tokens))
    longest = before + max(map(len, contexts), default=0) + sampling.max_tokens
    batch_size = rows_with_memory(model, longest, batch_size)
    with evaluating(model):
        for first in range(0, len(numbers), batch_size):
            batch = numbers[first : first + batch_size]
            places: dict[tuple[int, ...], int] = {}
            which = [places.setdefault(tuple(contexts[i]), len(places)) for i in batch]
            logits, states = _read(model, list(places), segment_length, prefix)
            rows = [
                Row(
                    key=i,
                    sampling=sampling,
                    seed=i if seeds is None else seeds[i],
                    position=before + len(contexts[i]),
                    context=[*first_tokens, *contexts[i]],
                )
                for i in batch
            ]
            loop = DecodingLoop(model, tokenizer, agree=agree)
            loop.add(rows, logits[which], take_rows(states, which))
            while len(loop):
                for progress in loop.step():
                    if progress.error is not None:
                        raise progress.error
                    yield progress


def _read(
    model: RecurrentLM, contexts: Sequence[Tokens], segment_length: int, prefix: Prefix | None
) -> tuple[torch.Tensor, list[LayerState]]:
    """Read different contexts behind a prefix; one of them may be empty, and is then the last: they are sorted."""
    if prefix is None:
        return read_contexts(model, contexts, segment_length=segment_length)
    if contexts[-1]:
        return read_contexts(
            model, contexts, segment_length=segment_length, start=prefix.states, position=prefix.num_tokens
        )
    if len(contexts) == 1:
        return prefix.logits, prefix.states
    logits, states = _read(model, contexts[:-1], segment_length, prefix)
    return torch.cat([logits, prefix.logits]), join_rows(states, prefix.states)


def generate_continuations(
    model: RecurrentLM,
    contexts: Sequence[Tokens],
    sampling: Sampling,
    *,
    tokenizer: Tokenizer,
    batch_size: int,
    segment_length: int = DEFAULT_SEGMENT_LENGTH,
    seeds: Sequence[int] | None = None,
) -> Iterator[tuple[int, str]]:
    """Yield each context's number and whole text, in the order in which they are done.

    Arguments and errors are those of :func:`stream_continuations`.
    """
    if (stop := stop_with_special_token(sampling.until, tokenizer)) is not None:
        log.warning("stop string %r has a special token among other text, and can never come", stop)
    for progress in stream_continuations(
        model,
        contexts,
        sampling,
        tokenizer=tokenizer,
        batch_size=batch_size,
        segment_length=segment_length,
        seeds=seeds,
    ):
        if progress.finish_reason is not None:
            assert isinstance(progress.key, int)
            yield progress.key, progress.whole
