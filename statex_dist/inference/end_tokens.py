"""Tokens that end a text: what tokenizer, ``generation_config.json`` and ``config.json`` name, taken together.

A chat model names its end of turn in ``generation_config.json`` while its tokenizer names the end of a document. What a
tokenizer merely calls an end of turn does not count unless one of the files names it as an end of text.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from statex_dist.checkpoint.json_file import read_json
from statex_dist.data.tokenizer import Tokenizer
from statex_dist.errors import CheckpointError, reason, shown
from statex_dist.models.config import CONFIG_NAME, ModelConfig

log = logging.getLogger(__name__)

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
