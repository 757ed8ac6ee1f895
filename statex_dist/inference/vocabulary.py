"""Whether tokenizer, tokens and model belong together."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from statex_dist.data.tokenizer import Tokenizer, has_tokenizer
from statex_dist.errors import ConfigError, DataError
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
