"""Keys and values of associative recall from a tokenizer's own vocabulary."""

from __future__ import annotations

from statex_dist.data.tokenizer import Tokenizer
from statex_dist.errors import ConfigError
from statex_dist.inference.text import continuation_text

NUM_WORDS = 64
"""Keys at least, and values, as many as under the bytes tokenizer: guessing is then right as often."""

_SHORTEST_WORD = 2


def choose_words(tokenizer: Tokenizer, num_pairs: int) -> tuple[dict[int, str], dict[int, str]]:
    """Return ids of keys and of values with their texts: the first words of the vocabulary, alternately.

    Whole words of two letters or more come first, then other letters, then any other text. All texts differ, also
    without their spaces and in one case. Special tokens, bytes and parts of characters are left out. Trained
    vocabularies have frequent tokens first, which a model has seen often.

    Args:
        tokenizer: The model's, not that of bytes.
        num_pairs: Keys that a document needs at most.

    Raises:
        ConfigError: The vocabulary has too few such tokens.
    """
    num_keys = max(NUM_WORDS, num_pairs)
    kinds: tuple[dict[str, int], ...] = ({}, {}, {})
    texts: dict[int, str] = {}
    context = tokenizer.encode("a").tolist()
    for token in range(tokenizer.vocab_size):
        if len(kinds[0]) == num_keys + NUM_WORDS:
            break
        text = continuation_text(tokenizer, context, [token]) if tokenizer.stands_alone(token) else ""
        plain = text.strip().casefold()
        if plain and "\ufffd" not in plain:
            texts[token] = text
            is_word = text[0].isspace() and plain.isalpha() and len(plain) >= _SHORTEST_WORD
            kinds[0 if is_word else 1 if plain.isalpha() else 2].setdefault(plain, token)
    found: dict[str, int] = {}
    for kind in kinds:
        found |= {plain: token for plain, token in kind.items() if plain not in found}
    if len(found) < num_keys + NUM_WORDS:
        raise ConfigError(
            f"mqar needs {num_keys} keys and {NUM_WORDS} values with texts of their own, tokenizer {tokenizer.spec!r} "
            f"has {len(found)} such tokens; give --key-ids and --value-ids"
        )
    chosen = list(found.values())[: num_keys + NUM_WORDS]
    values = chosen[1 : 2 * NUM_WORDS : 2]
    return {i: texts[i] for i in chosen if i not in values}, {i: texts[i] for i in values}
