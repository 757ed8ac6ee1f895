"""Which tokens' text depends on tokens that come later, by the decoder of a ``tokenizer.json``.

Most decoders of the ``tokenizers`` library map tokens to text one by one. Exceptions are the first token,
and a character whose bytes are in several tokens. Byte fallback is different: it decodes a run of byte tokens
together, and one wrong byte turns the text of the whole run into replacement characters.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")

_TOKEN_BY_TOKEN = {"ByteLevel", "WordPiece", "Metaspace", "BPEDecoder", "ByteFallback", "Fuse", "Strip", "Replace"}

_JOINING = {"ByteLevel", "Fuse"}
"""Decoders that give one text for all tokens: what stands behind them in a sequence sees no tokens."""


def tokens_in_runs(decoder: Mapping[str, Any] | None, vocabulary: Mapping[str, int]) -> frozenset[int]:
    """Return the ids of tokens whose text may still change when further tokens come.

    Args:
        decoder: The ``decoder`` of a ``tokenizer.json``, or None where it has none.
        vocabulary: Ids by token.

    Returns:
        None of them, the byte tokens of byte fallback, or all where the decoder is not known to work token by token.
    """
    steps = list(_steps(decoder))
    kinds = [step.get("type") for step in steps]
    joined = next((i for i, kind in enumerate(kinds) if kind in _JOINING), len(kinds))
    if not set(kinds) <= _TOKEN_BY_TOKEN or any(not _by_character(step) for step in steps[joined + 1 :]):
        return frozenset(vocabulary.values())
    if "ByteFallback" in kinds:
        return frozenset(number for token, number in vocabulary.items() if _BYTE.fullmatch(token))
    return frozenset()


def _steps(decoder: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    if decoder is None:
        return
    if decoder.get("type") == "Sequence":
        for step in decoder["decoders"]:
            yield from _steps(step)
    else:
        yield decoder


def _by_character(step: Mapping[str, Any]) -> bool:
    """Return whether a decoder that is given the joined text maps its characters one by one, or strips its ends."""
    if step["type"] == "Replace":
        return len(step["pattern"].get("String", "")) == 1
    return step["type"] in ("Fuse", "Strip")
