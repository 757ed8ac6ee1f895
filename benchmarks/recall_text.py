"""Text of a folder with key-value statements in it: documents, a BPE tokenizer and recall documents.

A recall document is real text. After every few words of its first half a sentence ``KEY means VALUE.`` gives a pair; in
its second half the same sentences return in another order, and there each value can be predicted from the text before
it. Every key and every value is one token, a word of the tokenizer.
"""

from __future__ import annotations

import gzip
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from statex_dist.data.tokenizer import Tokenizer
from statex_dist.errors import ConfigError, DataError

SUFFIXES = (".txt", ".rst", ".md", ".pod")
LEAST_BYTES = 1000
"""Length of the shortest file and of the shortest piece."""
LEAST_ASCII = 0.97
"""Share of ASCII characters from which on a text counts as English."""

SPECIAL_TOKENS = ("<|endoftext|>", "<|pad|>")
NUM_WORDS = 64
"""Number of keys, and number of values, as in :mod:`statex_dist.evaluation.mqar`."""

_UNIT = re.compile(r"\s*\S+")
_WORD = re.compile(r" [a-z]{5,}(?![\w-])")
_BEFORE_VALUE, _AFTER_VALUE = " means", "."


def read_texts(folder: Path) -> list[str]:
    """Return the different English texts below a folder, in an order that does not depend on their names.

    Raises:
        DataError: There is none.
    """
    found: dict[str, str] = {}
    for path in folder.rglob("*"):
        if path.name.removesuffix(".gz").endswith(SUFFIXES) and path.is_file():
            data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            text = data.decode("utf-8", errors="replace")
            if len(data) >= LEAST_BYTES and sum(map(str.isascii, text)) >= LEAST_ASCII * len(text):
                found[digest([" ".join(text.split())])] = text
    if not found:
        raise DataError(f"text folder {folder} has no English text in files {', '.join(SUFFIXES)} (or these with .gz)")
    return [found[key] for key in sorted(found)]


def digest(texts: Sequence[str]) -> str:
    """Return a hash of texts in their order."""
    total = blake2b(digest_size=16)
    for text in texts:
        total.update(blake2b(text.encode(), digest_size=16).digest())
    return total.hexdigest()


def divide(texts: Sequence[str], counts: Mapping[str, int], size: int) -> dict[str, list[str]]:
    """Return pieces of at most ``size`` characters for every corpus; no text and no piece is in two of them.

    Args:
        texts: The texts.
        counts: Number of pieces by corpus.
        size: Length of a piece.

    Raises:
        ConfigError: There are fewer pieces.
    """
    remaining, seen, found = iter(texts), set[str](), dict[str, list[str]]()
    for name, count in counts.items():
        pieces: list[str] = []
        while len(pieces) < count:
            text = next(remaining, None)
            if text is None:
                raise ConfigError(f"the text has {len(pieces)} pieces for corpus {name}, which needs {count}")
            cut = dict.fromkeys(text[at : at + size].strip() for at in range(0, len(text), size))
            pieces += [piece for piece in cut if len(piece) >= LEAST_BYTES and piece not in seen]
            seen.update(cut)
        found[name] = pieces[:count]
    return found


def train_tokenizer(texts: Sequence[str], vocab_size: int, target: Path) -> None:
    """Train a byte-level BPE tokenizer and save it as a directory; ids 0 and 1 are EOS and padding."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    end, pad = SPECIAL_TOKENS
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token=end, pad_token=pad).save_pretrained(target)


def choose_words(tokenizer: Tokenizer, texts: Sequence[str]) -> list[int]:
    """Return the ids of the keys and the values: the most frequent words of the text that are single tokens.

    Raises:
        ConfigError: There are too few.
    """
    counts = Counter(word for text in texts for word in _WORD.findall(text))
    del counts[_BEFORE_VALUE]
    ids = {word: tokenizer.encode(word).tolist() for word, _ in counts.most_common(tokenizer.vocab_size)}
    found = [tokens[0] for tokens in ids.values() if len(tokens) == 1][: 2 * NUM_WORDS]
    if len(found) < 2 * NUM_WORDS:
        raise ConfigError(f"{len(found)} words of the text are single tokens; {2 * NUM_WORDS} are needed")
    return found


class RecallText:
    """Recall documents in text.

    Args:
        tokenizer: The model's.
        words: Ids of the keys and of the values, alternately (:func:`choose_words`).
        pieces: The text, which is used again from its beginning where it ends.
        words_between: Least and greatest number of words between two statements.
        seed: Seed of pairs, order and distances.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        words: Sequence[int],
        pieces: Sequence[str],
        words_between: Sequence[int],
        seed: int,
    ):
        self.keys, self.values = np.array(words[::2]), np.array(words[1::2])
        self.before_value, self.after = (tokenizer.encode(part).tolist() for part in (_BEFORE_VALUE, _AFTER_VALUE))
        self.words_between = words_between
        self.rng = np.random.default_rng(seed)
        self.stretches = self._read(tokenizer.encode_batch, pieces)

    def _read(
        self, encode: Callable[[Sequence[str]], list[npt.NDArray[np.uint32]]], pieces: Sequence[str]
    ) -> Iterator[list[int]]:
        """Yield stretches of a few words, without end."""
        low, high = self.words_between
        while True:
            for piece in pieces:
                units, at, stretches = _UNIT.findall(piece), 0, []
                while at < len(units):
                    size = int(self.rng.integers(low, high + 1))
                    stretches.append("".join(units[at : at + size]))
                    at += size
                yield from (ids.tolist() for ids in encode(stretches))

    def draw(self, num_pairs: int) -> tuple[list[int], list[int]]:
        """Return the tokens of a document and a mask of equal length, 1 at the answers."""
        keys = self.rng.permutation(self.keys)[:num_pairs].tolist()
        pairs = list(zip(keys, self.rng.choice(self.values, num_pairs).tolist(), strict=True))
        tokens: list[int] = []
        mask: list[int] = []
        for asked, order in enumerate((pairs, [pairs[i] for i in self.rng.permutation(num_pairs)])):
            for key, value in order:
                words = next(self.stretches) if self.words_between[1] else []
                start = [*words, key, *self.before_value]
                tokens += [*start, value, *self.after]
                mask += [0] * len(start) + [asked] + [0] * len(self.after)
        return tokens, mask
