"""RULER's needles in a haystack: the prompts of its eight retrieval tasks, at any depth and exact length.

A prompt hides sentences "One of the special magic numbers for KEY is: VALUE." in a haystack and asks for the values of
one or more keys. Tasks, sentences and scoring are those of Hsieh et al., "RULER: What's the Real Context Size of Your
Long-Context Language Models?" (arXiv 2404.06654; github.com/NVIDIA/RULER, scripts/data/synthetic/niah.py, and the
``ruler`` tasks of lm-evaluation-harness). What is different here, so that lengths are exact, depths are a grid and
nothing is downloaded, stands in docs/evaluation.md.
"""

from __future__ import annotations

import string
import uuid
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from statex_dist.data.tokenizer import Tokenizer
from statex_dist.errors import ConfigError
from statex_dist.evaluation.needle import IntArray, SentenceSource, fresh_sentences, running_text

Kind = Literal["words", "numbers", "uuids"]

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
SINGULAR = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.",
    "\nWhat is the special magic {kind} for {query} mentioned in the provided text? "
    "The special magic {kind} for {query} mentioned in the provided text is",
)
PLURAL = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.",
    "\nWhat are all the special magic {kind} for {query} mentioned in the provided text? "
    "The special magic {kind} for {query} mentioned in the provided text are",
)
MAX_NEW_TOKENS = 128
"""Tokens that a model may say."""

_MARK = "\0"
_ADJECTIVES = (
    *("amber", "ancient", "bitter", "blue", "bold", "brave", "bright", "brisk", "broken", "calm", "clever", "cold"),
    *("crisp", "curious", "dark", "deep", "distant", "dusty", "eager", "early", "empty", "faint", "fancy", "fierce"),
    *("flat", "fresh", "gentle", "giant", "glad", "golden", "grand", "green", "grey", "happy", "heavy", "hidden"),
    *("hollow", "honest", "humble", "icy", "idle", "kind", "late", "lazy", "light", "little", "lively", "lonely"),
    *("loud", "lucky", "mellow", "mighty", "misty", "modest", "narrow", "noble", "old", "pale", "patient", "plain"),
    *("polite", "proud", "quick", "quiet", "rapid", "red", "rich", "rough", "round", "rusty", "sandy", "sharp"),
    *("shiny", "short", "silent", "silver", "simple", "slow", "small", "smooth", "soft", "solid", "steady", "still"),
    *("stormy", "strange", "strong", "sunny", "sweet", "swift", "tall", "tender", "thin", "tidy", "tiny", "warm"),
    *("weary", "white", "wild", "wise", "wooden", "yellow", "young", "zealous"),
)
_NOUNS = (
    *("acorn", "anchor", "apple", "arrow", "autumn", "badge", "basket", "beacon", "bell", "bottle", "branch", "bread"),
    *("bridge", "brush", "bucket", "button", "cabin", "candle", "canyon", "carpet", "castle", "cellar", "chair"),
    *("cherry", "circle", "cliff", "clock", "cloud", "coast", "copper", "corner", "cottage", "cradle", "cup", "desert"),
    *("drum", "eagle", "engine", "falcon", "feather", "fence", "ferry", "field", "flame", "flute", "forest", "fox"),
    *("garden", "gate", "glacier", "glove", "goat", "grain", "hammer", "harbor", "hat", "hawk", "hedge", "helmet"),
    *("hill", "honey", "horse", "island", "jacket", "kettle", "key", "kite", "ladder", "lake", "lantern", "leaf"),
    *("lemon", "lily", "lion", "maple", "market", "meadow", "mill", "mirror", "moon", "moss", "mountain", "needle"),
    *("nest", "oak", "ocean", "orchard", "otter", "owl", "paddle", "palace", "paper", "pearl", "pebble", "pencil"),
    *("pepper", "piano", "pillow", "pine", "plum", "pond", "puppet", "quilt", "rabbit", "raven", "reed", "ribbon"),
    *("ring", "river", "road", "robin", "rocket", "roof", "rope", "rose", "sail", "saddle", "sand", "school"),
    *("shell", "ship", "shovel", "sparrow", "spoon", "spring", "star", "stone", "summer", "table", "tent", "thistle"),
    *("thunder", "tiger", "tower", "train", "trumpet", "tulip", "valley", "violin", "wagon", "wave", "whale", "willow"),
    *("window", "winter", "wolf", "wool"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RulerTask:
    """One of RULER's retrieval tasks.

    Attributes:
        haystack: ``noise`` (one line again and again), ``essay`` (running text) or ``needles`` (other keys' needles).
        key: What keys are.
        value: What values are.
        num_keys: Keys with needles.
        num_values: Needles, each with a value of its own, for a key.
        num_queries: Keys that are asked for.
    """

    haystack: Literal["noise", "essay", "needles"]
    key: Kind = "words"
    value: Kind = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1


RULER_TASKS = {
    "niah_single_1": RulerTask(haystack="noise"),
    "niah_single_2": RulerTask(haystack="essay"),
    "niah_single_3": RulerTask(haystack="essay", value="uuids"),
    "niah_multikey_1": RulerTask(haystack="essay", num_keys=4),
    "niah_multikey_2": RulerTask(haystack="needles"),
    "niah_multikey_3": RulerTask(haystack="needles", key="uuids", value="uuids"),
    "niah_multivalue": RulerTask(haystack="essay", num_values=4),
    "niah_multiquery": RulerTask(haystack="essay", num_keys=4, num_queries=4),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class RulerPrompt:
    """One prompt.

    Attributes:
        tokens: ``[length]`` int64.
        query: What is asked for.
        answers: The values that must be said.
        depths: For each answer the wanted depth of its needle, 0..1.
        positions: For each answer the index of its needle's first token.
    """

    tokens: IntArray
    query: str
    answers: tuple[str, ...]
    depths: tuple[float, ...]
    positions: tuple[int, ...]


def build_ruler_prompt(
    name: str,
    length: int,
    depth: int,
    *,
    depths: Sequence[float],
    seed: int,
    sample: int,
    tokenizer: Tokenizer,
    essay: SentenceSource,
) -> RulerPrompt:
    """Draw one prompt.

    Args:
        name: Of :data:`RULER_TASKS`.
        length: Tokens of the prompt, question and beginning of the answer included.
        depth: Index in ``depths`` of the first asked needle; every other needle gets a random one.
        depths: Shares of the haystack before a needle, 0..1.
        seed: With all arguments above and ``sample`` it fixes the prompt.
        sample: Number of the prompt.
        tokenizer: The model's tokenizer.
        essay: Running text for the tasks that want it.

    Raises:
        ConfigError: The length is too short for a haystack.
    """
    task = RULER_TASKS[name]
    place = (seed, zlib.crc32(name.encode()), length, round(depths[depth] * 1_000_000), sample)
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(place)))
    keys = _distinct(task.key, task.num_keys, rng)
    values = _distinct(task.value, task.num_keys * task.num_values, rng)
    # The asked keys come first: which ones they are says nothing, for keys are random and so are the places.
    asked = task.num_queries * task.num_values
    at = [depths[depth], *(depths[i] for i in rng.integers(len(depths), size=len(values) - 1))]
    separator = " " if task.haystack == "essay" else "\n"
    kind = task.value
    needles = [
        _encode(tokenizer, separator + NEEDLE.format(kind=kind, key=keys[i // task.num_values], value=value))
        for i, value in enumerate(values)
    ]
    head, tail = (_encode(tokenizer, text) for text in _frame(task, keys[: task.num_queries]))
    room = length - len(head) - len(tail) - sum(map(len, needles))
    if room < 1:
        raise ConfigError(
            f"{name}: length {length} leaves no room for a haystack; the prompt alone takes {length - room} tokens: "
            "set --lengths above that"
        )
    filler, borders = _source(task, keys, tokenizer, essay)(rng, room)
    # A needle stands before the sentence in which its depth falls.
    places = [int(borders[np.searchsorted(borders, d * room, side="right") - 1]) for d in at]
    order = sorted(range(len(needles)), key=lambda i: (places[i], rng.random()))
    parts, positions, done, written = [head], [0] * len(needles), 0, len(head)
    for i in order:
        parts += [filler[done : places[i]], needles[i]]
        written, done = written + places[i] - done, places[i]
        positions[i] = written
        written += len(needles[i])
    return RulerPrompt(
        tokens=np.concatenate([*parts, filler[done:], tail]),
        query=_listed(keys[: task.num_queries]),
        answers=tuple(values[:asked]),
        depths=tuple(at[:asked]),
        positions=tuple(positions[:asked]),
    )


def score_answer(text: str, answers: Sequence[str]) -> list[bool]:
    """Return for each answer whether the text contains it, whatever the case (RULER's ``string_match_all``)."""
    said = text.lower()
    return [answer.lower() in said for answer in answers]


def min_length(name: str, tokenizer: Tokenizer) -> int:
    """Return a number of tokens that no prompt of a task exceeds without its haystack, whatever is drawn.

    A tokenizer joins digits and letters of some keys and values and not of others; here none are joined.
    """
    task = RULER_TASKS[name]

    def most(pieces: Sequence[str]) -> int:
        return max(len(_encode(tokenizer, piece)) for piece in pieces)

    sizes = {
        "words": most(_ADJECTIVES) + most("-") + most(_NOUNS),
        "numbers": 7 * most(string.digits),
        "uuids": 32 * most("0123456789abcdef") + 4 * most("-"),
    }

    def size(text: str) -> int:
        return sum(most([piece]) for piece in text.split(_MARK) if piece)

    between = size(NEEDLE.format(kind=task.value, key=_MARK, value=_MARK)) + max(most("\n"), most(" "))
    needle = between + sizes[task.key] + sizes[task.value]
    head, tail = _frame(task, [_MARK] * task.num_queries)
    keys = tail.count(_MARK) * sizes[task.key]
    return task.num_keys * task.num_values * needle + size(head) + size(tail) + keys


def _frame(task: RulerTask, queries: Sequence[str]) -> tuple[str, str]:
    """Return what stands before and after the haystack."""
    plural = task.num_queries * task.num_values > 1
    before, after = PLURAL if plural else SINGULAR
    kind = task.value if plural else task.value.removesuffix("s")
    newline = "\n" if task.haystack == "essay" else ""  # lines bring their own
    return before.format(kind=kind) + newline, after.format(kind=kind, query=_listed(queries))


def _listed(queries: Sequence[str]) -> str:
    return queries[0] if len(queries) == 1 else f"{', '.join(queries[:-1])}, and {queries[-1]}"


def _source(task: RulerTask, keys: Sequence[str], tokenizer: Tokenizer, essay: SentenceSource) -> SentenceSource:
    if task.haystack == "essay":
        return essay
    if task.haystack == "noise":
        return running_text([f"\n{NOISE}"], tokenizer)

    def other_needles(rng: np.random.Generator, count: int) -> list[str]:
        made: list[str] = []
        while len(made) < count:
            key, value = _DRAW[task.key](rng), _DRAW[task.value](rng)
            if key not in keys:
                made.append("\n" + NEEDLE.format(kind=task.value, key=key, value=value))
        return made

    return fresh_sentences(other_needles, tokenizer)


def _word(rng: np.random.Generator) -> str:
    return f"{_ADJECTIVES[rng.integers(len(_ADJECTIVES))]}-{_NOUNS[rng.integers(len(_NOUNS))]}"


_DRAW: dict[Kind, Callable[[np.random.Generator], str]] = {
    "words": _word,
    "numbers": lambda rng: str(rng.integers(10**6, 10**7)),
    "uuids": lambda rng: str(uuid.UUID(bytes=rng.bytes(16), version=4)),
}


def _distinct(kind: Kind, count: int, rng: np.random.Generator) -> list[str]:
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        drawn[_DRAW[kind](rng)] = None
    return list(drawn)


def _encode(tokenizer: Tokenizer, text: str) -> IntArray:
    return tokenizer.encode(text).astype(np.int64)
