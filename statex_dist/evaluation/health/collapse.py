"""The ``collapse`` suite: what becomes of the recurrent states, and of the loss, far past the training length.

A model whose state is too large for the length that it was trained at has not learned to forget: past that length the
state of some heads leaves the range that it had in training, and the loss rises ("Stuffed Mamba", arXiv 2410.07145,
section 3). One long sequence is read segment by segment with a carried state, so that memory does not grow with its
length (the token ids aside), and the states are looked at where :func:`observed_positions` says.

Per layer, head and position: mean, variance, Frobenius norm and largest entry of the state matrix, computed in float64.
The loss of *every* target is counted, in the interval between two such positions. What is concluded from them is in
:mod:`statex_dist.evaluation.health.verdict`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
import xxhash

from statex_dist.data.tokenizer import Tokenizer
from statex_dist.errors import ConfigError, DataError
from statex_dist.evaluation.documents import read_documents
from statex_dist.evaluation.health.retention import RetentionProbe
from statex_dist.evaluation.journal import EvalUnit, Record
from statex_dist.evaluation.needle import filler_haystack
from statex_dist.evaluation.report import check_reading
from statex_dist.inference.prefill import DEFAULT_SEGMENT_LENGTH, device_of, evaluating, rows_that_fit
from statex_dist.inference.vocabulary import token_outside
from statex_dist.models.core.sequences import LayerState
from statex_dist.models.lm import RecurrentLM

PROMPTS = ("newlines", "text", "data")
STATISTICS = ("mean", "variance", "norm", "largest")

DEFAULT_MULTIPLE = 8
"""Length of a prompt, in training lengths, unless another is given."""

LEAST_POSITIONS = 3
"""Positions at which a collapse must be seen to be told from a fluctuation."""

_FIRST_POSITION = 16
_LEAST_INTERVALS = 4
_DIGITS = 9


@dataclass(frozen=True, kw_only=True, slots=True)
class CollapseSettings:
    """Settings of the ``collapse`` suite, and the criteria of a collapse.

    Attributes:
        train_length: Tokens of the longest document, or piece of one, that the model was trained on.
        length: Tokens of a prompt; None for :data:`DEFAULT_MULTIPLE` training lengths.
        prompts: Names of :data:`PROMPTS`: a newline repeated, made-up sentences, ``data``.
        data: A prepared dataset or text files for the prompt ``data``.
        sequences: Sequences of ``text`` and ``data``. There is one sequence of newlines, as all would be equal.
        points: Approximate number of positions at which states are read.
        every: The positions are multiples of this number: a mitigation may act at such positions only.
        variance_factor: A head has collapsed where its state's variance is above this multiple of the largest within
            the training length.
        loss_rise: The model has collapsed where its loss is this number of nats per token above its best within the
            training length.
        sustained: Share of the remaining positions at which a criterion must be met.
        batch_size: Sequences per forward pass.
        segment_length: Tokens per forward pass.
        seed: Seed of the sentences and of the intervals.
    """

    train_length: int
    length: int | None = None
    prompts: tuple[str, ...] = ("newlines", "text")
    data: str | None = None
    sequences: int = 4
    points: int = 128
    every: int = 1
    variance_factor: float = 4.0
    loss_rise: float = 0.5
    sustained: float = 0.9
    batch_size: int = 8
    segment_length: int = DEFAULT_SEGMENT_LENGTH
    seed: int = 0

    def __post_init__(self) -> None:
        if self.train_length < _FIRST_POSITION:
            raise ConfigError(f"train_length must be {_FIRST_POSITION} or more, not {self.train_length}")
        if not self.prompts:
            raise ConfigError(f"no prompt given; prompts of collapse: {', '.join(PROMPTS)}")
        for prompt in self.prompts:
            if prompt not in PROMPTS:
                raise ConfigError(f"prompt {prompt!r} is unknown; prompts of collapse: {', '.join(PROMPTS)}")
        if len(set(self.prompts)) != len(self.prompts):
            raise ConfigError(f"prompts {list(self.prompts)} name one twice; name each once")
        if ("data" in self.prompts) != (self.data is not None):
            raise ConfigError("the prompt 'data' and --data PATH belong together: give both or neither")
        check_reading(self, "sequences", "points", "every")
        for name, least in (("variance_factor", 1.0), ("loss_rise", 0.0)):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > least):
                raise ConfigError(f"{name} must be above {least:g}, not {value}")
        if self.length is not None and self.length < 2 * self.train_length:
            raise ConfigError(
                f"length {self.length} is below two training lengths of {self.train_length} tokens; give "
                f"{2 * self.train_length} or more, and more than {self.growth_seen_from} to see every head that never "
                "forgets"
            )
        if not 0 < self.sustained <= 1:
            raise ConfigError(f"sustained must be a share above 0 and at most 1, not {self.sustained}")
        if self.train_length % self.every or self.tokens % self.every:
            raise ConfigError(
                f"train_length {self.train_length} and length {self.tokens} must be multiples of the mitigation's "
                f"every={self.every}; change either"
            )

    @property
    def tokens(self) -> int:
        """Tokens that are read of each prompt."""
        return self.length if self.length is not None else DEFAULT_MULTIPLE * self.train_length

    @property
    def growth_seen_from(self) -> int:
        """Tokens past which the variance of a head that never forgets is above the factor of that in training.

        It grows with the tokens read on varied text, with their square on newlines.
        """
        factor = math.sqrt(self.variance_factor) if set(self.prompts) == {"newlines"} else self.variance_factor
        return math.ceil(factor * self.train_length)

    @property
    def doubt(self) -> str | None:
        """Reason why ``length`` is too short for a verdict on heads, or None."""
        if sum(position > self.growth_seen_from for position in self.positions) >= LEAST_POSITIONS:
            return None
        return (
            f"{self.tokens:,} tokens are too few for the verdict on heads: the variance of one that never forgets may "
            f"reach {self.variance_factor:g} times its largest in training only at {self.growth_seen_from:,} tokens; "
            f"read further, such as {2 * self.growth_seen_from:,}, before a head is called healthy"
        )

    @property
    def positions(self) -> list[int]:
        """Where states are looked at."""
        return observed_positions(self.tokens, self.train_length, self.points, every=self.every)


def observed_positions(length: int, train_length: int, points: int, *, every: int = 1) -> list[int]:
    """Return the numbers of tokens read at which states are looked at, ascending, the last one ``length``.

    About ``points`` equal steps over the whole length, but at least four up to the training length, which is one of the
    positions, so that "within the training length" is exact; and powers of two from 16 before the first of them.

    Args:
        length: Tokens of the prompt.
        train_length: Training length.
        points: Steps over the whole length.
        every: What all of them are rounded down to a multiple of; a divisor of both lengths.
    """
    within = min(train_length, max(_LEAST_INTERVALS, round(points * train_length / length)))
    beyond = min(length - train_length, max(_LEAST_INTERVALS, points - within))
    found = {i * train_length // within for i in range(1, within + 1)}
    found |= {train_length + i * (length - train_length) // beyond for i in range(1, beyond + 1)}
    first = _FIRST_POSITION
    while first < train_length // within:
        found.add(first)
        first *= 2
    return sorted({position // every * every for position in found} - {0})


def state_statistics(state: torch.Tensor) -> dict[str, npt.NDArray[np.float64]]:
    """Return mean, variance (over all entries, not corrected), Frobenius norm and largest entry of state matrices.

    Args:
        state: ``[B, H, ., .]``; its entries may be NaN or infinite, and so is then what is computed from them.

    Returns:
        ``[B, H]`` float64 for each of :data:`STATISTICS`.
    """
    entries = state.flatten(2).double()
    variance, mean = torch.var_mean(entries, dim=-1, correction=0)
    values = {
        "mean": mean,
        "variance": variance,
        "norm": entries.square().sum(-1).sqrt(),
        "largest": entries.abs().amax(-1),
    }
    return {name: value.cpu().numpy() for name, value in values.items()}


def collapse_units(model: RecurrentLM, settings: CollapseSettings, tokenizer: Tokenizer) -> list[EvalUnit]:
    """Return the suite's work: one unit for each batch of sequences of a prompt, a digest of given text in its key.

    A unit's records are its sequences: ``{"prompt", "sequence", "layers": [recurrent layers], "loss": [P], "states":
    {statistic: [[[P], heads], layers]}, "retention": [[heads], layers], "retention_slowest"}``. Values that are not
    finite are null.

    Args:
        model: The model, fp32.
        settings: What to read.
        tokenizer: The model's.

    Raises:
        ConfigError: A newline is no token of the tokenizer.
        DataError: The data is too short, or holds tokens outside the vocabulary.
    """
    batch_size = rows_that_fit(model, min(settings.segment_length, settings.tokens), settings.batch_size)
    units: list[EvalUnit] = []
    for prompt in settings.prompts:
        sequences = 1 if prompt == "newlines" else settings.sequences
        data = _cut_data(model, settings, tokenizer) if prompt == "data" else None
        for first in range(0, sequences, batch_size):
            numbers = range(first, min(first + batch_size, sequences))

            def run(
                prompt: str = prompt, numbers: range = numbers, data: npt.NDArray[np.int32] | None = data
            ) -> list[Record]:
                rows = [data[i] if data is not None else _draw(prompt, i, settings, tokenizer) for i in numbers]
                return _stream(model, np.stack(rows), settings, prompt, numbers)

            # Text that has changed since is another unit: what was found of the old one does not count.
            text = "" if data is None else f", text {xxhash.xxh3_64_hexdigest(data[numbers].tobytes())}"
            units.append(EvalUnit(key=f"{prompt}/{first}{text}", run=run, tokens=len(numbers) * settings.tokens))
    return units


def _draw(prompt: str, sequence: int, settings: CollapseSettings, tokenizer: Tokenizer) -> npt.NDArray[np.int32]:
    """Return a made-up prompt and the target after its last token, ``[length + 1]``."""
    count = settings.tokens + 1
    if prompt == "newlines":
        ids = tokenizer.encode("\n")
        if not len(ids):
            raise ConfigError(f"tokenizer {tokenizer.spec!r} has no token for a newline; give --prompts text")
        return np.resize(ids.astype(np.int32), count)
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((settings.seed, sequence, count))))
    return filler_haystack(tokenizer)(rng, count).astype(np.int32)


def _cut_data(model: RecurrentLM, settings: CollapseSettings, tokenizer: Tokenizer) -> npt.NDArray[np.int32]:
    """Return the first ``sequences`` runs of ``length + 1`` tokens of the data, documents joined end to end."""
    assert settings.data is not None
    wanted, parts, count = settings.sequences * (settings.tokens + 1), [], 0
    for piece in read_documents(Path(settings.data), tokenizer):
        parts.append(piece.tokens[: wanted - count].astype(np.int32))
        count += len(parts[-1])
        if count == wanted:
            break
    if count < wanted:
        raise DataError(
            f"--data {settings.data} holds {count:,} tokens; {settings.sequences} sequences of {settings.tokens:,} "
            f"need {wanted:,}: give more text, fewer --sequences or a shorter --length"
        )
    tokens = np.concatenate(parts)
    if tokens.min() < 0 or tokens.max() >= model.config.vocab_size:
        raise token_outside(int(tokens.max()), model.config.vocab_size, f"--data {settings.data}")
    return tokens.reshape(settings.sequences, -1)


def _stream(
    model: RecurrentLM, tokens: npt.NDArray[np.int32], settings: CollapseSettings, prompt: str, numbers: range
) -> list[Record]:
    """Read sequences ``[B, length + 1]`` and return a record of each."""
    positions = settings.positions
    losses: list[npt.NDArray[np.float64]] = []
    seen: list[list[dict[str, npt.NDArray[np.float64]]]] = []
    kept: list[tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]] = []
    states: list[LayerState] | None = None
    probe = RetentionProbe(model) if RetentionProbe.fits(model) else None
    with evaluating(model):
        for start, end in pairwise([0, *positions]):
            # The retention of a head is measured over the training length only: each layer runs twice for it.
            watching = probe if probe is not None and end <= settings.train_length else nullcontext()
            with watching:
                states, loss = read_tokens(model, tokens, start, end, states, settings.segment_length)
            losses.append(loss / (end - start))
            seen.append([state_statistics(state[0]) for state in recurrent_states(model, states)])
            if probe is not None and end == settings.train_length:
                kept = probe.retention()
                probe = None
    records = []
    for row, number in enumerate(numbers):
        layers = range(len(seen[0]))
        records.append(
            {
                "prompt": prompt,
                "sequence": number,
                "layers": [layer for layer, kind in model.state_places if kind == "recurrent"],
                "loss": finite([loss[row] for loss in losses]),
                "states": {
                    name: [
                        [finite([at[layer][name][row, head] for at in seen]) for head in range(_heads(seen, layer))]
                        for layer in layers
                    ]
                    for name in STATISTICS
                },
                "retention": [finite(whole[row]) for whole, _ in kept] or None,
                "retention_slowest": [finite(slowest[row]) for _, slowest in kept] or None,
            }
        )
    return records


def _heads(seen: Sequence[Sequence[dict[str, npt.NDArray[np.float64]]]], layer: int) -> int:
    return seen[0][layer]["mean"].shape[1]


def recurrent_states(model: RecurrentLM, states: Sequence[LayerState]) -> list[LayerState]:
    """Return the recurrent ones of a model's states, in the order of its recurrent layers; not keys and values."""
    return [state for (_, kind), state in zip(model.state_places, states, strict=True) if kind == "recurrent"]


def recurrent_layers(record: Record) -> list[int]:
    """Return the layers of a record's states; those that were written before hybrids have one for each layer."""
    layers: list[int] = record.get("layers") or list(range(len(next(iter(record["states"].values())))))
    return layers


def read_tokens(
    model: RecurrentLM,
    tokens: npt.NDArray[np.int32],
    start: int,
    end: int,
    states: list[LayerState] | None,
    segment_length: int,
) -> tuple[list[LayerState], npt.NDArray[np.float64]]:
    """Read tokens ``start..end``; return the states and each row's summed loss of the targets after them.

    A target behind the last token of a segment is the next segment's first token: none is dropped.

    Args:
        model: The model, in evaluation mode.
        tokens: ``[B, T]`` sequences, ``T`` above ``end``.
        start: First token to read.
        end: One past the last.
        states: Each layer's state before them, or None for zero.
        segment_length: Tokens per forward pass.
    """
    device = device_of(model)
    total = np.zeros(len(tokens))
    for at in range(start, end, segment_length):
        part = torch.as_tensor(tokens[:, at : min(at + segment_length, end) + 1], device=device).long()
        output = model(part[:, :-1], states=states, output_states=True)
        logits = output.logits.to(torch.promote_types(output.logits.dtype, torch.float32))
        losses = F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="none")
        total += losses.view(len(tokens), -1).double().sum(1).cpu().numpy()
        states = output.states
    assert states is not None
    return states, total


def finite(values: Sequence[float] | npt.NDArray[np.float64]) -> list[float | None]:
    """Return numbers for JSON, rounded to nine significant digits: null where one is NaN or infinite."""
    return [float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None for value in map(float, values)]


def series(record: Record, statistic: str) -> Iterator[tuple[int, int, npt.NDArray[np.float64]]]:
    """Yield layer, head and the values by position ``[P]`` of one of a record's statistics, NaN for null."""
    for layer, heads in zip(recurrent_layers(record), record["states"][statistic], strict=True):
        for head, values in enumerate(heads):
            yield layer, head, np.array(values, np.float64)
