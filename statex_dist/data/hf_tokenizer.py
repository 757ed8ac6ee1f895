"""Hugging Face fast tokenizers, used through their Rust backend.

Most decoders of the ``tokenizers`` library map tokens to text one by one. Exceptions are the first token,
and a character whose bytes are in several tokens. Byte fallback is different: it decodes a run of byte tokens
together, and one wrong byte turns the text of the whole run into replacement characters.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from statex_dist.data.special_tokens import SPECIAL_TOKENS_RULES, ControlTokens, CorpusEncoder
from statex_dist.errors import ConfigError, DataError, reason

log = logging.getLogger(__name__)

# Hashes without it are of releases that took neither BOS nor ``split_special_tokens`` into account.
_HASH_FORMAT = "2:"
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")

_TOKEN_BY_TOKEN = {"ByteLevel", "WordPiece", "Metaspace", "BPEDecoder", "ByteFallback", "Fuse", "Strip", "Replace"}

_JOINING = {"ByteLevel", "Fuse"}
"""Decoders that give one text for all tokens: what stands behind them in a sequence sees no tokens."""


class HFTokenizer:
    """A Hugging Face *fast* tokenizer, used through its Rust backend.

    Raises:
        DataError: It is a slow (pure Python) tokenizer, or one that gives random ids.
    """

    def __init__(self, tokenizer: Any, spec: str):
        if not getattr(tokenizer, "is_fast", False):
            raise DataError(
                f"tokenizer {spec}: a slow {type(tokenizer).__name__} without tokenizer.json; "
                "a fast tokenizer is needed: convert it with transformers and save it again"
            )
        self.spec = spec
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        if dropout := getattr(self._backend.model, "dropout", None):
            raise DataError(
                f"tokenizer {spec}: BPE dropout {dropout:g} gives other ids every time; set 'dropout' of the model in "
                "its tokenizer.json to null"
            )
        # A saved tokenizer may carry these from training; either would silently change documents.
        self._backend.no_truncation()
        self._backend.no_padding()
        vocabulary = tokenizer.get_vocab()
        self.vocab_size = max(vocabulary.values()) + 1
        self.bos_token_id = _int_or_none(tokenizer.bos_token_id)
        self.eos_token_id = _int_or_none(tokenizer.eos_token_id)
        self.pad_token_id = self.eos_token_id if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
        self.end_tokens: Mapping[int, Sequence[str]] = (
            {} if self.eos_token_id is None else {self.eos_token_id: ("tokenizer",)}
        )
        added = self._backend.get_added_tokens_decoder()
        # Those are what decoding leaves out; not all of them are in one of the named slots (eos_token and so on).
        self._special = {token.content: int(number) for number, token in added.items() if token.special}
        decoder = None if self._backend.decoder is None else json.loads(self._backend.decoder.__getstate__())
        self._textless = frozenset(self._special.values())
        self._alone = frozenset(vocabulary.values()) - self._textless - tokens_in_runs(decoder, vocabulary)
        if tokenizer.clean_up_tokenization_spaces and type(self._backend.model).__name__ != "BPE":
            log.info("tokenizer %s: clean_up_tokenization_spaces is not applied; texts keep all their spaces", spec)
        # The whole backend, added tokens and their flags included, but for one flag that it does not report.
        state = self._backend.to_str()
        added_ids = f"bos {self.bos_token_id} eos {self.eos_token_id} split {self._backend.encode_special_tokens}"
        self.hash = _HASH_FORMAT + _digest(f"{added_ids} {state}")
        self.old_hash = _digest(f"{self.eos_token_id} {state}")

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of ``text``, ``[n]`` uint32, without special tokens."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return :meth:`encode` of every text; the Rust backend may use several threads."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, np.uint32) for encoding in encodings]

    def for_corpus(self, special_tokens: str) -> CorpusEncoder:
        """Return an encoder for text of a corpus, under a rule for markers of special tokens.

        Raises:
            ConfigError: There is no such rule.
        """
        if special_tokens not in SPECIAL_TOKENS_RULES:
            raise ConfigError(f"special_tokens is {special_tokens!r}; allowed: {', '.join(SPECIAL_TOKENS_RULES)}")
        control = ControlTokens(self._backend, self._special, keep=special_tokens == "keep")
        if control.ordinary:
            names = ", ".join(sorted(control.ordinary)[:4])
            log.info("tokenizer %s: special tokens that are ordinary pieces too stay in text: %s", self.spec, names)
        if special_tokens == "keep" and self._backend.encode_special_tokens:
            log.warning("tokenizer %s has split_special_tokens: true, so markers are split, not kept", self.spec)
        return control

    def template_start(self) -> list[int]:
        """Return the ids that the tokenizer's own template puts in front of a text."""
        plain = self.encode("a").tolist()
        whole = self._backend.encode("a", add_special_tokens=True).ids
        starts = (i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
        return whole[: next(starts, 0)] if plain else []

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ``ids`` without special tokens, and with every space that the tokens have."""
        return self._tokenizer.decode(
            [int(i) for i in ids], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def special_id(self, text: str) -> int | None:
        """Return the id of the special token that is written ``text``, or None."""
        return self._special.get(text)

    def is_special(self, token: int) -> bool:
        """Return whether the id is that of a special token."""
        return token in self._textless

    def token_name(self, token: int) -> str:
        """Return the token as the vocabulary has it."""
        return repr(self._backend.id_to_token(token) if 0 <= token < self.vocab_size else None)

    def stands_alone(self, token: int) -> bool:
        """Return whether an id has text that no later token changes, but for a last character that is not whole."""
        return token in self._alone

    def save(self, directory: str | Path) -> None:
        """Write the tokenizer's files into ``directory``."""
        self._tokenizer.save_pretrained(str(directory))


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


def load_fast(directory: Path) -> Any:
    """Return transformers' tokenizer of a directory, with ``tokenizer.json`` as it stands where there is one.

    AutoTokenizer takes the class that ``tokenizer_config.json`` names, and some classes of transformers 5 (those of
    Llama and T5) put their own normalizer and pre-tokenizer in place of the file's. Only the end-of-text token that
    such a class has by default is taken from it.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    options = {"local_files_only": True, "trust_remote_code": False}
    if not (directory / "tokenizer.json").is_file():
        return AutoTokenizer.from_pretrained(str(directory), **options)
    loaded = PreTrainedTokenizerFast.from_pretrained(str(directory), local_files_only=True)
    if loaded.eos_token_id is None:
        default = _class_default(directory, options)
        if default in loaded.get_vocab():
            loaded.eos_token = default
    return loaded


def _class_default(directory: Path, options: Mapping[str, Any]) -> str | None:
    """Return the end-of-text token of the class that a directory names; None if there is none, or no such class."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(directory), **options).eos_token
    except Exception as error:  # any: the class may need files or settings that tokenizer.json replaces
        log.info("tokenizer %s: no end-of-text token, and its class names none: %s", directory, reason(error))
        return None


def is_current_hash(found: str) -> bool:
    """Return whether a hash of a Hugging Face tokenizer has the format of this release."""
    return found.startswith(_HASH_FORMAT)


def _digest(text: str) -> str:
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _int_or_none(value: Any) -> int | None:
    return None if value is None else int(value)
