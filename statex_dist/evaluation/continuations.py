"""Scoring and generating continuations of contexts of any length, in batches of unequal rows.

A recurrent state has no mask: a token that is read is in it for ever. So rows of a batch are never filled up while they
are read. They advance together to the end of the shortest row, which then leaves the batch with its own state, and the
others go on. Several continuations of one context start from copies of its one state. Memory depends on the batch, the
segment and the states, not on how long a context is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from statex_dist.data.tokenizer import Tokenizer
from statex_dist.errors import ConfigError, DataError
from statex_dist.evaluation.streaming import device_of, evaluating, explain_row, prefill, rows_that_fit, token_outside
from statex_dist.models.lm import RecurrentLM
from statex_dist.models.sequence import LayerState
from statex_dist.ops.precision import wide_dtype

Tokens = Sequence[int]

# A tail of so many tokens more than a stop string has bytes holds it, however the tokens lie on it.
_TAIL = 8


@dataclass(frozen=True, slots=True)
class Score:
    """What a model says of a continuation.

    Attributes:
        logprob: Sum of the tokens' log-probabilities, in nats.
        is_greedy: Whether each token is the most likely one.
    """

    logprob: float
    is_greedy: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How continuations are drawn.

    Attributes:
        max_tokens: Tokens at most.
        until: Strings that end a continuation and are no part of it. EOS always does.
        temperature: 0 takes the most likely token.
        top_k: Draw from the so many most likely tokens only; 0 for all.
        top_p: Draw from the fewest tokens whose probability is at least this.
    """

    max_tokens: int
    until: tuple[str, ...] = ()
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens must be 1 or more, not {self.max_tokens}")
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ConfigError(
                f"temperature {self.temperature:g}, top_k {self.top_k} and top_p {self.top_p:g} make no sampling; "
                "allowed: temperature and top_k of 0 or more, top_p above 0 and at most 1"
            )


def read_contexts(
    model: RecurrentLM,
    contexts: Sequence[Tokens],
    *,
    segment_length: int,
    start: Sequence[LayerState] | None = None,
    position: int = 0,
) -> tuple[torch.Tensor, list[LayerState]]:
    """Read contexts of unequal length, each to its own last token.

    A forward pass ends wherever a row does, so a model whose result depends on where passes end
    (:meth:`~statex_dist.models.mitigation.Mitigation.check_segments`) gives a row other numbers in another batch.

    Args:
        model: The model.
        contexts: ``B`` contexts of one token or more.
        segment_length: Most tokens per forward pass.
        start: Each layer's state ``[1, ...]`` before all of them, left as it is, or None for zero.
        position: Position of a context's first token, for messages.

    Returns:
        Logits ``[B, vocab]`` after each context's last token, and the states there, ``[B, ...]``.
    """
    device = device_of(model)
    # The longest first: rows that end are always the last of the batch.
    order = sorted(range(len(contexts)), key=lambda i: len(contexts[i]), reverse=True)
    at, active = 0, len(order)
    states = None if start is None else take_rows(start, [0] * active)
    ended: list[tuple[torch.Tensor, list[LayerState]]] = []
    while active:
        end = len(contexts[order[active - 1]])
        ids = torch.tensor([list(contexts[i][at:end]) for i in order[:active]], device=device)
        logits, after = prefill(model, ids, segment_length=segment_length, states=states, position=position + at)
        at, rows = end, active
        while active and len(contexts[order[active - 1]]) == at:
            active -= 1
        states = [tuple(tensor[:active] for tensor in state) for state in after]
        if active < rows:
            ended.append((logits[active:], [tuple(tensor[active:] for tensor in state) for state in after]))
    ended.reverse()
    back = torch.tensor(np.argsort(order), device=device)
    joined = [
        tuple(torch.cat(tensors)[back] for tensors in zip(*layer, strict=True))
        for layer in zip(*(part for _, part in ended), strict=True)
    ]
    return torch.cat([part for part, _ in ended])[back], joined


def take_rows(states: Sequence[LayerState], rows: Sequence[int] | torch.Tensor) -> list[LayerState]:
    """Return the states of some rows; a row may be named more than once."""
    index = torch.as_tensor(rows, device=states[0][0].device)
    return [tuple(tensor[index] for tensor in state) for state in states]


def check_token_ids(sequences: Sequence[Tokens], vocab_size: int) -> None:
    """Raise unless every id has an embedding.

    Raises:
        DataError: One has none.
    """
    largest = max((max(tokens) for tokens in sequences if len(tokens)), default=0)
    if largest >= vocab_size:
        raise token_outside(largest, vocab_size, "a request")


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
    # Rows of like length share the most forward passes, and what is too long for the memory fails first.
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
        before = [tuple(tensor[:active] for tensor in state) for state in states]
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
    wide = logits.to(wide_dtype(logits.dtype))
    logprobs = wide.gather(-1, targets[..., None])[..., 0] - wide.logsumexp(dim=-1)
    sums = torch.where(counted, logprobs, 0).double().sum(dim=1)
    return sums, ((wide.argmax(dim=-1) == targets) | ~counted).all(dim=1)


def generate_continuations(
    model: RecurrentLM,
    contexts: Sequence[Tokens],
    sampling: Sampling,
    *,
    tokenizer: Tokenizer,
    batch_size: int,
    segment_length: int,
    seeds: Sequence[int] | None = None,
) -> Iterator[tuple[int, str]]:
    """Yield each context's number and the text that the model continues it with, in the order in which they are done.

    Args:
        model: The model.
        contexts: One token or more each; a context that occurs again is read once.
        sampling: How to continue.
        tokenizer: The model's tokenizer.
        batch_size: Rows per forward pass.
        segment_length: Most tokens per forward pass.
        seeds: One for each context, of what is drawn for it (whatever else is in the batch); None for its number.

    Raises:
        DataError: A context is empty, or a token is outside the model's vocabulary.
        CheckpointError: The model's output is not finite; layer and position are named.
    """
    if any(not len(context) for context in contexts):
        raise DataError("a context is empty; there is nothing to continue")
    check_token_ids(contexts, model.config.vocab_size)
    numbers = sorted(range(len(contexts)), key=lambda i: (-len(contexts[i]), tuple(contexts[i])))
    batch_size = rows_that_fit(model, 1, batch_size)
    with evaluating(model):
        for start in range(0, len(numbers), batch_size):
            batch = numbers[start : start + batch_size]
            places: dict[tuple[int, ...], int] = {}
            rows = [places.setdefault(tuple(contexts[i]), len(places)) for i in batch]
            logits, states = read_contexts(model, list(places), segment_length=segment_length)
            generators = [np.random.Generator(np.random.Philox(i if seeds is None else seeds[i])) for i in batch]
            lengths = [len(contexts[i]) for i in batch]
            texts = _generate_rows(
                model, logits[rows], take_rows(states, rows), sampling, tokenizer, generators, lengths
            )
            yield from ((batch[row], text) for row, text in texts)


def _generate_rows(
    model: RecurrentLM,
    logits: torch.Tensor,
    states: list[LayerState],
    sampling: Sampling,
    tokenizer: Tokenizer,
    generators: list[np.random.Generator],
    lengths: list[int],
) -> Iterator[tuple[int, str]]:
    """Yield row and text of every row as it ends; the others go on without it."""
    produced: list[list[int]] = [[] for _ in generators]
    rows = list(range(len(generators)))
    ends = _end_ids(sampling.until, tokenizer)
    while True:
        chosen = _choose(logits, sampling, [generators[row] for row in rows])
        going: list[int] = []
        for i, row in enumerate(rows):
            token = int(chosen[i])
            if token not in ends:
                produced[row].append(token)
                if len(produced[row]) < sampling.max_tokens and not _stopped(produced[row], sampling.until, tokenizer):
                    going.append(i)
                    continue
            yield row, cut(tokenizer.decode(produced[row]), sampling.until)
        if not going:
            return
        kept = states if len(going) == len(rows) else take_rows(states, going)
        rows = [rows[i] for i in going]
        ids = torch.as_tensor(chosen[going], device=logits.device)[:, None]
        positions = [lengths[row] + len(produced[row]) - 1 for row in rows]
        logits, states = prefill(model, ids, states=kept, position=positions)


def _end_ids(until: Sequence[str], tokenizer: Tokenizer) -> set[int]:
    """Return the tokens that end a text: EOS, and stop strings of one token (a special one is not in decoded text)."""
    encoded = (tokenizer.encode(text) for text in until)
    return {tokenizer.eos_token_id, *(int(ids[0]) for ids in encoded if len(ids) == 1)}


def _stopped(tokens: list[int], until: Sequence[str], tokenizer: Tokenizer) -> bool:
    if not until:
        return False
    tail = tokenizer.decode(tokens[-max(len(text.encode()) for text in until) - _TAIL :])
    return any(text in tail for text in until) and any(text in tokenizer.decode(tokens) for text in until)


def cut(text: str, until: Sequence[str]) -> str:
    """Return ``text`` up to the first of the stop strings."""
    return text[: min((at for stop in until if (at := text.find(stop)) >= 0), default=len(text))]


def _choose(
    logits: torch.Tensor, sampling: Sampling, generators: Sequence[np.random.Generator]
) -> npt.NDArray[np.int64]:
    """Return each row's next token, ``[B]``, drawn with the row's own generator."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1).cpu().numpy()
    values, tokens = (logits.double() / sampling.temperature).sort(dim=-1, descending=True, stable=True)
    if sampling.top_k:
        values[:, sampling.top_k :] = -torch.inf
    shares = values.softmax(dim=-1)
    # A token is left out where those before it have the wanted probability already.
    shares[shares.cumsum(dim=-1) - shares >= sampling.top_p] = 0
    bounds = (shares.cumsum(dim=-1) / shares.sum(dim=-1, keepdim=True)).cpu().numpy()
    places = [int(np.searchsorted(row, g.random(), side="right")) for row, g in zip(bounds, generators, strict=True)]
    # Rounding may leave the last bound below 1.
    last = [int(count) - 1 for count in (shares > 0).sum(dim=-1).tolist()]
    picked = torch.tensor([min(pair) for pair in zip(places, last, strict=True)], device=tokens.device)
    return tokens.gather(1, picked[:, None])[:, 0].cpu().numpy()
