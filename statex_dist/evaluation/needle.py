"""A passkey in a haystack: does the state keep one fact over a long text?

A prompt is a short instruction, filler text with one sentence that names a five-digit key at a given depth, and a
question; the model continues greedily and is right if the first five characters are the key. Protocol: passkey
retrieval of Mohtashami and Jaggi (arXiv 2305.16300), in the form of "Stuffed Mamba" (arXiv 2410.07145, section 4).

A prompt is put together from tokens, not from text, so its length in tokens is exact under any tokenizer. It is read
segment by segment with a carried state: memory does not grow with the length.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from statex_dist.data.tokenizer import Tokenizer
from statex_dist.errors import ConfigError
from statex_dist.evaluation.greedy import decode_greedily
from statex_dist.evaluation.haystack import fresh_sentences, made_up_sentences, read_haystack
from statex_dist.inference.prefill import DEFAULT_SEGMENT_LENGTH, device_of, evaluating
from statex_dist.inference.text import continuation_text
from statex_dist.models.lm import RecurrentLM

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
        path: What :func:`~statex_dist.evaluation.haystack.read_haystack` reads.
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
        ConfigError: The length leaves no room for a haystack.
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
