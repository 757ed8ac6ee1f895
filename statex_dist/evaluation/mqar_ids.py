"""Ids of the keys and values of associative recall: ranges, or words of a tokenizer's vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

from statex_dist.data.tokenizer import Tokenizer
from statex_dist.errors import ConfigError
from statex_dist.inference.text import continuation_text

NUM_WORDS = 64
"""Least number of keys, and number of values: those of the bytes tokenizer, so that chance levels are the same."""

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


def listed_ids(ids: Sequence[int]) -> Sequence[int]:
    """Return all ids that a setting names: two are a range, its first id and one past the last; more are a list."""
    return range(*ids) if len(ids) == 2 else ids


def shown_ids(ids: Sequence[int]) -> str:
    """Return how messages write the ids of a setting."""
    return f"{ids[0]}:{ids[1]}" if len(ids) == 2 else f"{len(ids)} words"


def check_ids(ids: Sequence[int], name: str, *, vocab_size: int, tokenizer: Tokenizer | None) -> None:
    """Raise unless a model can read the ids of a setting, called ``name``.

    Args:
        ids: As :func:`listed_ids` reads them.
        name: ``keys`` or ``values``.
        vocab_size: Of the model.
        tokenizer: The model's, or None.

    Raises:
        ConfigError: One is outside the vocabulary or the tokenizer, or is a special token.
    """
    where, option = f"mqar {name} {shown_ids(ids)}", f"--{name[:-1]}-ids"
    if max(listed_ids(ids)) >= vocab_size:
        raise ConfigError(
            f"{where} do not fit the model's vocabulary of {vocab_size}; "
            f"set {option} FIRST:END with END at most {vocab_size}"
        )
    if tokenizer is None:
        return
    for token in listed_ids(ids):
        if tokenizer.is_special(token) or token >= tokenizer.vocab_size:
            why = f"special token {tokenizer.token_name(token)}" if tokenizer.is_special(token) else "no token"
            raise ConfigError(f"{where}: id {token} is {why}; set {option} to a range without it")
