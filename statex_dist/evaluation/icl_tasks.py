"""The tasks of the ``icl`` suite: labelled examples from a file or made up, drawn into trials."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from statex_dist.checkpoint.json_file import parse_json
from statex_dist.errors import ConfigError, DataError, reason
from statex_dist.evaluation.report import check_different, check_reading
from statex_dist.inference.prefill import DEFAULT_SEGMENT_LENGTH

MADE_UP_LABELS = ("gold", "blue", "pink", "teal", "rose", "navy", "ruby", "jade")
"""Of one length: a longer label would be less likely to begin with."""

_CONSONANTS, _VOWELS = "bdfgklmnprstvwz", "aeiou"
_SYLLABLES = [consonant + vowel for consonant in _CONSONANTS for vowel in _VOWELS]
_WORDS = len(_SYLLABLES) ** 2


@dataclass(frozen=True, kw_only=True, slots=True)
class IclSettings:
    """Settings of the ``icl`` suite.

    Attributes:
        shots: Numbers of examples before a query.
        num_trials: Draws of examples and queries.
        num_queries: Queries of a trial.
        num_labels: Labels of the made-up task.
        permute_labels: Exchange the labels in each trial, so that a label's own meaning gives no answer. No label keeps
            its own meaning: two labels have one such exchange, more have ``labels - 1`` (a shift each).
        batch_size: Rows (a query, or one label behind it) per forward pass.
        segment_length: Tokens per forward pass.
        seed: Seed of all draws and of the intervals.
    """

    shots: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    num_trials: int = 20
    num_queries: int = 16
    num_labels: int = 4
    permute_labels: bool = False
    batch_size: int = 64
    segment_length: int = DEFAULT_SEGMENT_LENGTH
    seed: int = 0

    def __post_init__(self) -> None:
        check_reading(self, "num_trials", "num_queries")
        if not 2 <= self.num_labels <= len(MADE_UP_LABELS):
            raise ConfigError(f"num_labels must be 2 to {len(MADE_UP_LABELS)}, not {self.num_labels}")
        check_different("shots", self.shots, least=0)


@dataclass(frozen=True, slots=True)
class Example:
    """A text and its label."""

    text: str
    label: str


def read_examples(path: Path) -> list[Example]:
    """Read a JSON-lines file of ``{"text": ..., "label": ...}``; other keys are ignored.

    Raises:
        DataError: The file or a line cannot be read, or there are fewer than two labels.
    """
    examples: list[Example] = []
    try:
        # JSON allows within a string what splitlines() takes for a line's end.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"examples {path} cannot be read: {error}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            values = parse_json(line)
            text, label = values["text"], values["label"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f'examples {path}, line {number}: {reason(error)}; each line must be {{"text": ..., "label": ...}}'
            ) from None
        if not isinstance(text, str) or not isinstance(label, str | int) or not str(label).strip():
            raise DataError(f"examples {path}, line {number}: text must be a string, label a string or whole number")
        try:
            f"{text}{label}".encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"examples {path}, line {number}: {error.object[error.start]!r} is half of a surrogate pair, "
                "which no text can hold; write the whole character"
            ) from None
        examples.append(Example(text.strip(), str(label).strip()))
    if len({example.label for example in examples}) < 2:
        raise DataError(
            f"examples {path}: {len(examples)} examples with fewer than two labels; give two or more labels"
        )
    return examples


def check_examples(examples: Sequence[Example] | None, settings: IclSettings) -> None:
    """Raise unless there are enough examples of *each* label for even shots and queries.

    With fewer of one, queries would be of some labels more than of others, and chance no longer ``1 / labels``.

    Args:
        examples: To draw from; None for the made-up task.
        settings: What to measure.

    Raises:
        ConfigError: There are not.
    """
    if examples is None:
        counts = dict.fromkeys(MADE_UP_LABELS[: settings.num_labels], _WORDS)
        what = "the made-up task"
    else:
        counts = dict(sorted(Counter(example.label for example in examples).items()))
        what = "the file"
    # Shots and queries are each drawn in rounds over all labels.
    needed = -(-max(settings.shots) // len(counts)) + -(-settings.num_queries // len(counts))
    rarest = min(counts, key=lambda label: counts[label])
    if counts[rarest] < needed:
        raise ConfigError(
            f"icl needs {needed} examples of each of {len(counts)} labels for {max(settings.shots)} shots and "
            f"{settings.num_queries} queries, {what} has {counts[rarest]} of {rarest!r}; "
            "set --shots or --num-queries lower, or give more"
        )


def made_up_examples(settings: IclSettings, *, trial: int, count: int) -> list[Example]:
    """Return distinct made-up words whose last syllable decides their label, by a rule that the seed fixes.

    Args:
        settings: Number of labels and seed.
        trial: Which words; the rule is that of all trials.
        count: Examples of each label.
    """
    endings = _rng(settings.seed).permutation(len(_SYLLABLES))[: settings.num_labels]
    rng = _rng(settings.seed, trial, 1)
    examples: list[Example] = []
    for label, ending in zip(MADE_UP_LABELS, endings.tolist(), strict=False):
        for begin in rng.permutation(len(_SYLLABLES) ** 2)[:count].tolist():
            first, second = divmod(begin, len(_SYLLABLES))
            examples.append(Example(_SYLLABLES[first] + _SYLLABLES[second] + _SYLLABLES[ending], label))
    return examples


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """Examples and queries of one trial.

    Attributes:
        shots: Examples in order; the labels of the first ``n`` are as even as possible, for every ``n``.
        queries: Other examples, with labels as even as possible.
        labels: All choices.
    """

    shots: tuple[Example, ...]
    queries: tuple[Example, ...]
    labels: tuple[str, ...]


def draw_trial(examples: Sequence[Example], trial: int, settings: IclSettings) -> Trial:
    """Draw a trial.

    Args:
        examples: To draw from, without replacement.
        trial: Its number, which fixes it together with the seed.
        settings: Numbers of shots and queries, whether labels are exchanged, and the seed.

    Raises:
        ConfigError: There are too few examples.
    """
    rng = _rng(settings.seed, trial)
    labels = sorted({example.label for example in examples})
    left = {label: [e for e in examples if e.label == label] for label in labels}
    for of_label in left.values():
        rng.shuffle(of_label)

    def take(count: int) -> list[Example]:
        taken: list[Example] = []
        while len(taken) < count:
            some = [labels[i] for i in rng.permutation(len(labels)) if left[labels[i]]]
            if not some:
                raise ConfigError(f"icl: {len(examples)} examples are too few for a trial; set --shots lower")
            taken += [left[label].pop() for label in some]
        return taken[:count]

    queries, shots = take(settings.num_queries), take(max(settings.shots))
    shift = int(rng.integers(1, len(labels))) if settings.permute_labels else 0
    renamed = {label: labels[(i + shift) % len(labels)] for i, label in enumerate(labels)}
    return Trial(
        shots=tuple(Example(e.text, renamed[e.label]) for e in shots),
        queries=tuple(Example(e.text, renamed[e.label]) for e in queries),
        labels=tuple(labels),
    )


def _rng(*place: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(place)))
