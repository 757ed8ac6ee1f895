"""Where the filler of long prompts comes from, with the borders of its sentences known in tokens.

A source draws an exact number of tokens, and says where its sentences begin: RULER's needles stand only there. A
passkey, on a line of its own, stands at its exact depth and may part a word.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from statex_dist.data.tokenizer import Tokenizer
from statex_dist.errors import DataError
from statex_dist.evaluation.documents import read_documents

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
    """Return a source whose sentences are made anew for each draw.

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
