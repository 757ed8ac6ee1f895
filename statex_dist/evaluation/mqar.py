"""Multi-query associative recall: how many key-value pairs fit into the recurrent state.

A document lists ``n`` pairs and then asks for every key once, in random order::

    k1 v1 k2 v2 ... kn vn | q1 a1 q2 a2 ... qn an

Nothing but the state carries the pairs to the queries, so the accuracy over ``n`` is the state's capacity. Task: Arora
et al., "Zoology: Measuring and Improving Recall in Efficient Language Models" (arXiv 2312.04927); here without filler
tokens, with all pairs before all queries, which is the hardest order for a state of fixed size.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from statex_dist.data.tokenizer import Tokenizer
from statex_dist.errors import ConfigError
from statex_dist.evaluation.journal import EvalUnit, Record
from statex_dist.evaluation.mqar_ids import check_ids, listed_ids, shown_ids
from statex_dist.evaluation.report import (
    Estimate,
    bootstrap,
    check_different,
    check_reading,
    plot_curve,
    write_results,
)
from statex_dist.inference.prefill import (
    DEFAULT_SEGMENT_LENGTH,
    device_of,
    evaluating,
    explain_not_finite,
    rows_that_fit,
)
from statex_dist.models.core.sequences import LayerState
from statex_dist.models.lm import RecurrentLM

DEFAULT_KEYS = range(128, 192)
"""Keys under the bytes tokenizer: ids that never start a UTF-8 character, so that text hardly uses them alone."""

DEFAULT_VALUES = range(192, 256)
"""Values under the bytes tokenizer."""

NEAR_PERFECT = 0.95
"""Accuracy from which on a number of pairs counts as held by the state."""


def generate_mqar(
    num_pairs: int,
    num_samples: int,
    *,
    seed: int,
    keys: Sequence[int] = DEFAULT_KEYS,
    values: Sequence[int] = DEFAULT_VALUES,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
    """Draw recall documents.

    Args:
        num_pairs: Pairs ``n`` in each document.
        num_samples: Documents ``S``.
        seed: With ``num_pairs`` it fixes the documents; the first documents of a longer draw need not be the same.
        keys: Token ids of the keys; a document's keys are distinct.
        values: Token ids of the values, drawn uniformly with replacement.

    Returns:
        ``tokens [S, 4n]`` int64 and ``answer_mask [S, 4n]`` uint8, 1 at the answers: ``2n + 1, 2n + 3, ..., 4n - 1``.

    Raises:
        ConfigError: More pairs than keys, or a count, seed or range that makes no document.
    """
    for name, count in (("num_pairs", num_pairs), ("num_samples", num_samples)):
        if count < 1:
            raise ConfigError(f"{name} must be 1 or more, not {count}")
    if seed < 0:
        raise ConfigError(f"seed must be 0 or more, not {seed}")
    key_ids, value_ids = np.asarray(keys, dtype=np.int64), np.asarray(values, dtype=np.int64)
    if len(np.unique(key_ids)) != len(key_ids) or not len(value_ids):
        raise ConfigError("mqar needs distinct keys and at least one value")
    if num_pairs > len(key_ids):
        raise ConfigError(
            f"mqar cannot draw {num_pairs} distinct keys from a range of {len(key_ids)}; ask for fewer pairs"
        )
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, num_pairs))))
    # Sorting uniform numbers shuffles each row on its own; its first n columns are a draw without replacement.
    chosen = np.argsort(rng.random((num_samples, len(key_ids))), axis=1)[:, :num_pairs]
    drawn = np.stack([key_ids[chosen], value_ids[rng.integers(len(value_ids), size=chosen.shape)]], axis=2)
    order = np.argsort(rng.random((num_samples, num_pairs)), axis=1)
    asked = np.take_along_axis(drawn, order[:, :, None], axis=1)
    tokens = np.concatenate([drawn, asked], axis=1).reshape(num_samples, 4 * num_pairs)
    answer_mask = np.zeros(tokens.shape, dtype=np.uint8)
    answer_mask[:, 2 * num_pairs + 1 :: 2] = 1
    return tokens, answer_mask


def score_mqar(
    model: RecurrentLM,
    tokens: npt.NDArray[np.int64],
    answer_mask: npt.NDArray[np.uint8],
    *,
    batch_size: int = 32,
    segment_length: int = DEFAULT_SEGMENT_LENGTH,
) -> npt.NDArray[np.float64]:
    """Return each document's share of right answers.

    The true answers are fed back (teacher forcing), so that one wrong answer does not spoil the next query. An answer
    is right where the most likely of *all* tokens is the value.

    Args:
        model: The model.
        tokens: ``[S, T]`` documents.
        answer_mask: ``[S, T]``, 1 at answers; every document has equally many.
        batch_size: Documents per forward pass, fewer where the logits would take too much memory.
        segment_length: Tokens of a document per forward pass.

    Returns:
        ``[S]`` accuracies in 0..1.

    Raises:
        CheckpointError: The model's logits are not finite; layer and position are named.
    """
    assert not answer_mask[:, 0].any(), "an answer needs a token before it"
    device, shares = device_of(model), []
    batch_size = rows_that_fit(model, min(tokens.shape[1], segment_length), batch_size)
    with evaluating(model):
        for start in range(0, len(tokens), batch_size):
            ids = torch.as_tensor(tokens[start : start + batch_size], device=device)
            mask = torch.as_tensor(answer_mask[start : start + batch_size], device=device).bool()
            states: list[LayerState] | None = None
            right = torch.zeros_like(mask)
            for at in range(0, ids.shape[1] - 1, segment_length):
                segment = ids[:, at : min(at + segment_length, ids.shape[1] - 1)]
                output = model(segment, states=states, output_states=True)
                if not torch.isfinite(output.logits).all():
                    raise explain_not_finite(model, segment, states, position=at)
                states, end = output.states, at + 1 + segment.shape[1]
                right[:, at + 1 : end] = output.logits.argmax(dim=-1) == ids[:, at + 1 : end]
            shares.append(right[mask].view(len(ids), -1).double().mean(dim=1).cpu().numpy())
    return np.concatenate(shares)


@dataclass(frozen=True, kw_only=True, slots=True)
class MqarSettings:
    """Settings of the ``mqar`` suite.

    Attributes:
        num_pairs: Numbers of key-value pairs.
        num_samples: Documents for each number of pairs.
        vocabulary: Source of the ids: ranges for the bytes tokenizer (the default), words of the model's tokenizer
            (:func:`~statex_dist.evaluation.mqar_ids.choose_words`), or ranges that the user gave.
        keys: First id of the keys and one past the last; all ids where they are words.
        values: First id of the values and one past the last; all ids where they are words.
        batch_size: Documents per forward pass.
        segment_length: Tokens of a document per forward pass.
        seed: Seed of the documents and of the intervals.
    """

    num_pairs: tuple[int, ...] = (8, 16, 32, 64)
    num_samples: int = 256
    vocabulary: Literal["bytes", "words", "given"] = "bytes"
    keys: tuple[int, ...] = (DEFAULT_KEYS.start, DEFAULT_KEYS.stop)
    values: tuple[int, ...] = (DEFAULT_VALUES.start, DEFAULT_VALUES.stop)
    batch_size: int = 32
    segment_length: int = DEFAULT_SEGMENT_LENGTH
    seed: int = 0

    def __post_init__(self) -> None:
        check_reading(self, "num_samples")
        check_different("num_pairs", self.num_pairs)
        for name in ("keys", "values"):
            ids = getattr(self, name)
            if len(ids) == 2 and not 0 <= ids[0] < ids[1]:
                raise ConfigError(f"{name} must be FIRST:END with 0 <= FIRST < END, not {ids[0]}:{ids[1]}")
        if max(self.num_pairs) > len(listed_ids(self.keys)):
            raise ConfigError(
                f"mqar cannot draw {max(self.num_pairs)} distinct keys from {shown_ids(self.keys)}; "
                f"set --num-pairs to at most {len(listed_ids(self.keys))} or a wider --key-ids"
            )


def guessing_accuracy(num_pairs: int, settings: MqarSettings) -> float:
    """Return the accuracy of a model that names a random value of the context, ``1/n + (1 - 1/n) / values``."""
    return 1 / num_pairs + (1 - 1 / num_pairs) / len(listed_ids(settings.values))


def eliminating_accuracy(num_pairs: int, settings: MqarSettings) -> float:
    """Return the accuracy, on the suite's documents, of a model that names the commonest value not yet answered.

    The true answers are fed back, so a model that remembers the context's values but not whose they are can cross off
    those that are answered: the best it can do is expected to be right on ``most / left`` of the answers.
    """
    tokens, mask = _documents(num_pairs, settings)
    shares = []
    for answers in tokens[mask.astype(bool)].reshape(len(tokens), num_pairs).tolist():
        counts: Counter[int] = Counter()
        most = 0
        for left, value in enumerate(reversed(answers), start=1):
            counts[value] += 1
            most = max(most, counts[value])
            shares.append(most / left)
    return sum(shares) / len(shares)


def _documents(num_pairs: int, settings: MqarSettings) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
    return generate_mqar(
        num_pairs,
        settings.num_samples,
        seed=settings.seed,
        keys=listed_ids(settings.keys),
        values=listed_ids(settings.values),
    )


def mqar_units(model: RecurrentLM, settings: MqarSettings, tokenizer: Tokenizer | None = None) -> list[EvalUnit]:
    """Return the suite's units: a batch of documents each.

    Args:
        model: The model, fp32 where the figures are to be compared.
        settings: What to measure.
        tokenizer: The model's, to check ids with, or None.

    Raises:
        ConfigError: Keys or values are outside the model's vocabulary, or special tokens.
    """
    for name in ("keys", "values"):
        check_ids(getattr(settings, name), name, vocab_size=model.config.vocab_size, tokenizer=tokenizer)

    @functools.cache
    def documents(num_pairs: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
        return _documents(num_pairs, settings)

    def run(num_pairs: int, samples: slice) -> list[Record]:
        tokens, mask = documents(num_pairs)
        shares = score_mqar(
            model,
            tokens[samples],
            mask[samples],
            batch_size=settings.batch_size,
            segment_length=settings.segment_length,
        )
        return [
            {"num_pairs": num_pairs, "sample": i, "accuracy": share}
            for i, share in enumerate(shares.tolist(), start=samples.start)
        ]

    units: list[EvalUnit] = []
    for num_pairs in settings.num_pairs:
        for start in range(0, settings.num_samples, settings.batch_size):
            samples = slice(start, min(start + settings.batch_size, settings.num_samples))
            units.append(
                EvalUnit(
                    key=f"{num_pairs} pairs, documents {samples.start}..{samples.stop - 1}",
                    run=functools.partial(run, num_pairs, samples),
                    tokens=4 * num_pairs * (samples.stop - samples.start),
                )
            )
    return units


def summarise_mqar(records: Sequence[Record], settings: MqarSettings) -> dict[int, Estimate]:
    """Return the accuracy for each number of pairs, with its interval over documents."""
    return {
        n: bootstrap([r["accuracy"] for r in records if r["num_pairs"] == n], seed=settings.seed)
        for n in settings.num_pairs
    }


def pairs_recalled(accuracy: float, num_pairs: int, settings: MqarSettings) -> float:
    """Return how many of the pairs are recalled rather than named at random: ``n (a - g) / (1 - g)``, at least 0."""
    guessing = guessing_accuracy(num_pairs, settings)
    return max(0.0, num_pairs * (accuracy - guessing) / (1 - guessing)) if guessing < 1 else float(num_pairs)


def write_mqar(
    records: Sequence[Record],
    directory: Path,
    settings: MqarSettings,
    *,
    model: Mapping[str, Any],
    timing: Mapping[str, Any] | None = None,
    vocabulary: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write ``mqar.json``, ``mqar.jsonl``, ``mqar.png`` (accuracy) and ``mqar_capacity.png`` (pairs recalled)."""
    result = summarise_mqar(records, settings)
    pairs = sorted(result)
    plot = plot_curve(
        pairs,
        [result[n] for n in pairs],
        title="Associative recall",
        x_label="key-value pairs in the context",
        y_label="accuracy (band: 95 % interval)",
        y_limits=(-0.03, 1.03),
        reference=([guessing_accuracy(n, settings) for n in pairs], "a random value of the context"),
    )
    recalled = {
        n: Estimate(
            mean=pairs_recalled(e.mean, n, settings),
            low=None if e.low is None else pairs_recalled(e.low, n, settings),
            high=None if e.high is None else pairs_recalled(e.high, n, settings),
            samples=e.samples,
        )
        for n, e in result.items()
    }
    capacity = plot_curve(
        pairs,
        [recalled[n] for n in pairs],
        title="Capacity: pairs recalled rather than named at random",
        x_label="key-value pairs in the context",
        y_label="pairs recalled (band: 95 % interval)",
        reference=(pairs, "all of them"),
    )
    held = [n for n in pairs if result[n].mean >= NEAR_PERFECT]
    summary = {
        "model": model,
        "by_num_pairs": {
            str(n): {
                **result[n].to_dict(),
                "guessing": guessing_accuracy(n, settings),
                "eliminating": eliminating_accuracy(n, settings),
                "pairs_recalled": recalled[n].mean,
                "pairs_recalled_low": recalled[n].low,
                "pairs_recalled_high": recalled[n].high,
            }
            for n in settings.num_pairs
        },
        "capacity": {"threshold": NEAR_PERFECT, "num_pairs": max(held, default=None)},
        "vocabulary": {"source": settings.vocabulary, **(vocabulary or {})},
        "settings": dataclasses.asdict(settings),
        "timing": timing or {},
    }
    return write_results(directory, "mqar", summary, records, {"mqar.png": plot, "mqar_capacity.png": capacity})
