"""Whether tokenizer, tokens and model belong together, and which tokens end a text.

What tokenizer, ``generation_config.json`` and ``config.json`` name as the end of a text is taken together: a chat model
names its end of turn in ``generation_config.json`` while its tokenizer names the end of a document. What a tokenizer
merely calls an end of turn does not count unless one of the files names it as an end of text.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from statex_dist.checkpoint.json_file import read_json
from statex_dist.data.tokenizer import Tokenizer, has_tokenizer
from statex_dist.errors import CheckpointError, ConfigError, DataError, reason, shown
from statex_dist.models.config import CONFIG_NAME, ModelConfig
from statex_dist.models.lm import RecurrentLM
from statex_dist.models.source import find_model

log = logging.getLogger(__name__)


def token_outside(token: int, vocab_size: int, what: str) -> DataError:
    """Return the error of text, called ``what``, that holds a token without an embedding."""
    return DataError(
        f"{what} holds token {token}, the model's vocabulary ends at {vocab_size - 1}; "
        "use the tokenizer that the model was trained with"
    )


def tokenizer_of(model: str, tokenizer: str | None) -> str:
    """Return what was given as tokenizer, or the model's directory if it holds one.

    Raises:
        ConfigError: Neither.
    """
    if tokenizer:
        return tokenizer
    model_dir = find_model(model)
    if not has_tokenizer(model_dir):
        raise ConfigError(f"model {model} comes without a tokenizer; give --tokenizer bytes or --tokenizer DIR")
    return str(model_dir)


def check_vocabulary(model: RecurrentLM, tokenizer: Tokenizer) -> None:
    """Raise if the tokenizer has ids that the model has no embedding for.

    Raises:
        ConfigError: It has.
    """
    ids, rows = tokenizer.vocab_size, model.config.vocab_size
    if ids > rows:
        raise ConfigError(
            f"tokenizer {tokenizer.spec!r} has ids up to {ids - 1}, the model's embedding ends at {rows - 1}; "
            "set --tokenizer to the one that the model was trained with"
        )


def doubt_tokenizer(model: RecurrentLM, tokenizer: Tokenizer) -> None:
    """Warn if the tokenizer leaves most of the model's embedding unused: it may be that of another model."""
    ids, rows = tokenizer.vocab_size, model.config.vocab_size
    if ids < rows // 2:
        log.warning("tokenizer %r has %d ids, the model's embedding %d: is it the model's?", tokenizer.spec, ids, rows)


def check_token_ids(sequences: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Raise unless every id has an embedding.

    Raises:
        DataError: One has none.
    """
    largest = max((max(tokens) for tokens in sequences if len(tokens)), default=0)
    if largest >= vocab_size:
        raise token_outside(largest, vocab_size, "a request")


GENERATION_CONFIG_NAME = "generation_config.json"
_KEY = "eos_token_id"


def use_end_tokens(tokenizer: Tokenizer, config: ModelConfig, directory: Path) -> None:
    """Make ``tokenizer`` end texts at all end tokens that a model names.

    Args:
        tokenizer: The tokenizer that the model is run with.
        config: The model's.
        directory: The model's, which may hold a ``generation_config.json``.

    Raises:
        CheckpointError: ``generation_config.json`` is damaged.
    """
    named = {
        "tokenizer": _ids(tokenizer.eos_token_id, directory),
        GENERATION_CONFIG_NAME: _generation_ids(directory / GENERATION_CONFIG_NAME),
        CONFIG_NAME: _ids(config.eos_token_id, directory / CONFIG_NAME),
    }
    places: dict[int, list[str]] = {}
    for place, ids in named.items():
        for token in ids:
            places.setdefault(token, []).append(place)
    tokenizer.end_tokens = places


def log_end_tokens(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Log the tokens that end a text and what names them, with a warning of those that are hardly meant.

    Args:
        tokenizer: After :func:`use_end_tokens`.
        vocab_size: Of the model.
    """
    if not tokenizer.end_tokens:
        log.warning(
            "no end token: tokenizer, %s and %s name none; texts end at their length",
            GENERATION_CONFIG_NAME,
            CONFIG_NAME,
        )
        return
    texts = {token: f"{token} {tokenizer.token_name(token)}" for token in tokenizer.end_tokens}
    named = {token: " and ".join(names) for token, names in tokenizer.end_tokens.items()}
    log.info("end tokens: %s", "; ".join(f"{texts[token]} ({named[token]})" for token in texts))
    for token, place in named.items():
        if not 0 <= token < vocab_size:
            log.warning("%s: end token %d is outside the model's vocabulary of %d tokens", place, token, vocab_size)
        elif not tokenizer.is_special(token):
            log.warning("%s: end token %s is not a special token; every text ends where it comes", place, texts[token])


def _generation_ids(path: Path) -> list[int]:
    if not path.is_file():
        return []
    try:
        values = read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {reason(error)}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return _ids(values.get(_KEY), path)


def _ids(value: Any, path: Path) -> list[int]:
    ids = value if isinstance(value, list | tuple) else [] if value is None else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise CheckpointError(f"{path}: '{_KEY}' must be a token id, a list of them or null, not {shown(value, 60)}")
    return list(dict.fromkeys(ids))
