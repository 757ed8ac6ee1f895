"""A passkey in a haystack: does the state keep one fact over a long text?

A prompt is a short instruction, filler text with one sentence that names a five-digit key at a given depth, and a
question; the model continues greedily and is right if the first five characters are the key. Protocol: passkey
retrieval of Mohtashami and Jaggi (arXiv 2305.16300), in the form of "Stuffed Mamba" (arXiv 2410.07145, section 4).

A prompt is put together from tokens, not from text, so its length in tokens is exact under any tokenizer. It is read
segment by segment with a carried state: memory does not grow with the length.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from statex_dist.data.tokenizer import Tokenizer
from statex_dist.errors import ConfigError, DataError
from statex_dist.evaluation.documents import read_documents
from statex_dist.evaluation.scoring import decode_greedily
from statex_dist.inference.prefill import DEFAULT_SEGMENT_LENGTH, device_of, evaluating
from statex_dist.inference.text import continuation_text
from statex_dist.models.lm import RecurrentLM

MAX_BYTES = 64 << 20
"""Text that is read of a haystack; four million tokens of it are more than any prompt takes."""

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_SPACE = re.compile(r"\s+")
_SUBJECTS = ("river", "garden", "old bridge", "market", "lighthouse", "forest", "harbour", "village", "meadow", "train")
_VERBS = ("rests beside", "looks over", "turns towards", "belongs to", "is older than", "lies behind", "faces")
_PLACES = ("hills", "northern road", "sea", "empty square", "stone wall", "orchard", "railway", "quiet valley")

IntArray = npt.NDArray[np.int64]


class SentenceSource(Protocol):
    """Draws filler."""

    def __call__(self, rng: np.random.Generator, num_tokens: int) -> tuple[IntArray, IntArray]:
        """Return ``[num_tokens]`` ids and the ascending places in them at which a sentence begins, the first one 0."""
        ...


def running_text(sentences: Sequence[str], tokenizer: Tokenizer) -> SentenceSource:
    """Return a source that reads on from a random sentence, from the start again at the end.

    Args:
        sentences: The text, each sentence with what separates it from the one before.
        tokenizer: The model's tokenizer.
    """
    pieces = [np.asarray(ids, np.int64) for ids in tokenizer.encode_batch(list(sentences))]
    tokens = np.concatenate(pieces)
    lengths = np.array([len(piece) for piece in pieces])
    starts = (np.cumsum(lengths) - lengths)[lengths > 0]
    assert len(tokens), "a haystack without a token"

    def draw(rng: np.random.Generator, num_tokens: int) -> tuple[IntArray, IntArray]:
        first = int(starts[rng.integers(len(starts))])
        rounds = np.arange(-(-num_tokens // len(tokens)))[:, None] * len(tokens)
        borders = (np.sort((starts - first) % len(tokens)) + rounds).ravel()
        return tokens[(first + np.arange(num_tokens)) % len(tokens)], borders[borders < num_tokens]

    return draw


def fresh_sentences(make: Callable[[np.random.Generator, int], list[str]], tokenizer: Tokenizer) -> SentenceSource:
    """Return a source whose sentences are new in each draw.

    Args:
        make: Returns a number of sentences, each with what separates it from the one before.
        tokenizer: The model's tokenizer.
    """

    def draw(rng: np.random.Generator, num_tokens: int) -> tuple[IntArray, IntArray]:
        pieces: list[IntArray] = []
        missing = num_tokens
        while missing > 0:
            for ids in tokenizer.encode_batch(make(rng, missing // 24 + 1)):
                pieces.append(np.asarray(ids, np.int64))
                missing -= len(ids)
        lengths = np.array([len(piece) for piece in pieces])
        borders = np.cumsum(lengths) - lengths
        return np.concatenate(pieces)[:num_tokens], borders[borders < num_tokens]

    return draw


def made_up_sentences(rng: np.random.Generator, count: int) -> list[str]:
    """Return ``count`` sentences without a digit, of 560 possible ones."""
    chosen = (rng.integers(len(words), size=count) for words in (_SUBJECTS, _VERBS, _PLACES))
    return [f" The {_SUBJECTS[s]} {_VERBS[v]} the {_PLACES[p]}." for s, v, p in zip(*chosen, strict=True)]


def split_sentences(text: str) -> list[str]:
    """Return the sentences of a text, each behind one space, white space made plain."""
    return [f" {sentence}" for part in _SENTENCE_END.split(text) if (sentence := _SPACE.sub(" ", part).strip())]


def read_haystack(path: Path, tokenizer: Tokenizer) -> str:
    """Return the first 64 MiB of a text file, or of the documents of a directory, glob, JSON-lines or parquet file.

    Args:
        path: A text file, or whatever ``statex prepare`` reads or has written.
        tokenizer: The model's; a prepared dataset must be of the same.

    Raises:
        DataError: Nothing is there, it is not UTF-8, or it holds no text.
    """
    if path.is_file() and path.suffix in ("", ".txt", ".md"):
        text = _read_text(path)
    else:
        parts: list[str] = []
        left = MAX_BYTES
        for piece in read_documents(path, tokenizer):
            parts.append(tokenizer.decode(piece.tokens[:left].tolist()))
            left -= len(parts[-1])
            if left <= 0:
                break
        text = "\n".join(parts)
    if not text.strip():
        raise DataError(f"haystack {path} is empty; give a text file or leave the option out for made-up sentences")
    return text


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES)
            # A character may be cut where reading stopped, never where the file ends.
            return content.decode("utf-8", errors="ignore" if file.read(1) else "strict")
    except OSError as error:
        raise DataError(f"haystack {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"haystack {path} is not UTF-8 text: byte {error.start}") from None


NUM_DIGITS = 5
INSTRUCTION = "A passkey is hidden in the text below. Remember it.\n"
NEEDLE = "\nThe passkey is {key}. Remember it. {key} is the passkey.\n"
QUESTION = "\nWhat is the passkey? The passkey is"

Haystack = Callable[[np.random.Generator, int], npt.NDArray[np.int64]]
"""Draws a given number of filler tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NeedlePrompts:
    """Prompts of one length and depth.

    Attributes:
        tokens: ``[S, length]`` int64.
        keys: The digits to be recalled, one string a prompt.
        positions: ``[S]`` int64, index of the needle's first token.
    """

    tokens: npt.NDArray[np.int64]
    keys: tuple[str, ...]
    positions: npt.NDArray[np.int64]


def depth_values(depths: int) -> list[float]:
    """Return the middles ``(i + 0.5) / depths`` of ``depths`` equal parts of the haystack, 0 its start, 1 its end."""
    return [(i + 0.5) / depths for i in range(depths)]


def filler_haystack(tokenizer: Tokenizer) -> Haystack:
    """Return a source of made-up sentences without any digit."""
    source = fresh_sentences(made_up_sentences, tokenizer)
    return lambda rng, num_tokens: source(rng, num_tokens)[0]


def file_haystack(path: Path, tokenizer: Tokenizer) -> Haystack:
    """Return a source that cuts pieces from random places of a text (its first 64 MiB), wrapping at its end.

    Args:
        path: What :func:`~statex_dist.evaluation.needle.read_haystack` reads.
        tokenizer: The model's tokenizer.

    Raises:
        DataError: The file is missing, empty or not UTF-8.
    """
    ids = tokenizer.encode(read_haystack(path, tokenizer)).astype(np.int64)

    def draw(rng: np.random.Generator, num_tokens: int) -> npt.NDArray[np.int64]:
        return ids[(int(rng.integers(len(ids))) + np.arange(num_tokens)) % len(ids)]

    return draw


def min_length(tokenizer: Tokenizer) -> int:
    """Return a number of tokens that no prompt exceeds without its haystack, whatever the key.

    A tokenizer joins the digits of some keys and not of others; here none are joined.
    """
    between = NEEDLE.split("{key}")
    digit = max(len(tokenizer.encode(digit)) for digit in string.digits)
    parts = sum(len(tokenizer.encode(part)) for part in (INSTRUCTION, *between, QUESTION))
    return parts + (len(between) - 1) * NUM_DIGITS * digit


def check_digits(tokenizer: Tokenizer) -> None:
    """Raise if no model could answer, because the tokenizer's tokens do not make up a passkey's digits.

    Raises:
        ConfigError: They do not.
    """
    for key in (string.digits[:NUM_DIGITS], string.digits[-NUM_DIGITS:]):
        said = continuation_text(tokenizer, tokenizer.encode(QUESTION).tolist(), tokenizer.encode(f" {key}").tolist())
        if said.lstrip()[:NUM_DIGITS] != key:
            raise ConfigError(
                f"tokenizer {tokenizer.spec!r} turns passkey {key} into {said[:20]!r}; no answer could be right: give "
                "the model's tokenizer, or measure with mqar"
            )


def build_prompts(
    length: int,
    depth: float,
    num_samples: int,
    *,
    seed: int,
    tokenizer: Tokenizer,
    haystack: Haystack | None = None,
    first_sample: int = 0,
) -> NeedlePrompts:
    """Draw prompts.

    Args:
        length: Tokens of every prompt, the question included, the answer not.
        depth: Share of the haystack before the needle, 0..1.
        num_samples: Prompts ``S``.
        seed: With ``length``, ``depth`` and a prompt's number it fixes the prompt.
        tokenizer: The model's tokenizer.
        haystack: Where the filler comes from; None for :func:`filler_haystack`.
        first_sample: Number of the first prompt.

    Raises:
        ConfigError: The length is too short for a haystack.
    """
    draw = haystack or filler_haystack(tokenizer)
    keys: list[str] = []
    tokens = np.empty((num_samples, length), np.int64)
    positions = np.empty(num_samples, np.int64)
    instruction, question = (tokenizer.encode(text).astype(np.int64) for text in (INSTRUCTION, QUESTION))
    for i in range(num_samples):
        place = (seed, length, round(depth * 1_000_000), first_sample + i)
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(place)))
        key = f"{rng.integers(10**NUM_DIGITS):0{NUM_DIGITS}d}"
        keys.append(key)
        needle = tokenizer.encode(NEEDLE.format(key=key)).astype(np.int64)
        room = length - len(instruction) - len(needle) - len(question)
        if room < 1:
            raise ConfigError(
                f"passkey: length {length} leaves no room for a haystack; the prompt alone takes {length - room} "
                f"tokens: set --lengths above that"
            )
        filler, before = draw(rng, room), int(depth * room)
        tokens[i] = np.concatenate([instruction, filler[:before], needle, filler[before:], question])
        positions[i] = len(instruction) + before
    return NeedlePrompts(tokens=tokens, keys=tuple(keys), positions=positions)


def answer_prompts(
    model: RecurrentLM,
    prompts: NeedlePrompts,
    *,
    tokenizer: Tokenizer,
    batch_size: int = 32,
    segment_length: int = DEFAULT_SEGMENT_LENGTH,
) -> list[str]:
    """Return the first :data:`NUM_DIGITS` characters that the model says to each prompt, leading space aside.

    Args:
        model: The model.
        prompts: What to ask.
        tokenizer: The model's tokenizer.
        batch_size: Prompts per forward pass.
        segment_length: Tokens of a prompt per forward pass.

    Raises:
        CheckpointError: The model's logits are not finite; layer and position are named.
    """
    device = device_of(model)
    answers: list[str] = []
    with evaluating(model):
        for start in range(0, len(prompts.tokens), batch_size):
            ids = torch.as_tensor(prompts.tokens[start : start + batch_size], device=device)
            # One token for the space and one for each digit is the most that any tokenizer needs.
            produced = decode_greedily(model, ids, NUM_DIGITS + 1, segment_length=segment_length)
            rows = zip(prompts.tokens[start : start + batch_size].tolist(), produced.cpu().tolist(), strict=True)
            texts = (continuation_text(tokenizer, prompt, said) for prompt, said in rows)
            answers.extend(text.lstrip()[:NUM_DIGITS] for text in texts)
    return answers
