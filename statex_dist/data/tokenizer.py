"""Tokenizers: raw bytes (no file needed) and Hugging Face fast tokenizers from a local directory.

A directory says by itself which one it holds: ``tokenizer_config.json`` with ``"tokenizer_class": "BytesTokenizer"``
marks bytes, anything else is left to ``transformers``. A model directory can carry either.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from statex_dist.checkpoint.json_file import read_json
from statex_dist.data.special_tokens import SPECIAL_TOKENS_RULES, ControlTokens, CorpusEncoder
from statex_dist.data.token_runs import tokens_in_runs
from statex_dist.errors import ConfigError, DataError, reason

log = logging.getLogger(__name__)

_MARKER = "tokenizer_config.json"
_BYTES_CLASS = "BytesTokenizer"
# Hashes without it are of releases that took neither BOS nor ``split_special_tokens`` into account.
_HASH_FORMAT = "2:"


class Tokenizer(Protocol):
    """What data preparation needs of a tokenizer. ``encode`` adds no special tokens; ``prepare`` adds BOS and EOS.

    Attributes:
        spec: What :func:`load_tokenizer` was given to make it.
        vocab_size: One more than the largest id.
        bos_token_id: Id that may stand in front of a document; None if the tokenizer has none.
        eos_token_id: Id that ends a document; None if the tokenizer has none.
        pad_token_id: Id that fills a pack; None if the tokenizer has none.
        hash: Digest of the mapping from text to ids and of the ids that are added; equal hashes mean interchangeable
            tokenizers.
        old_hash: What releases up to manifest version 2 had in its place.
        end_tokens: Ids that end a text that a model writes, each with what names it: the tokenizer, or a model's file.
    """

    end_tokens: Mapping[int, Sequence[str]]

    @property
    def spec(self) -> str: ...  # noqa: D102 - documented by the class

    @property
    def vocab_size(self) -> int: ...  # noqa: D102

    @property
    def bos_token_id(self) -> int | None: ...  # noqa: D102

    @property
    def eos_token_id(self) -> int | None: ...  # noqa: D102

    @property
    def pad_token_id(self) -> int | None: ...  # noqa: D102

    @property
    def hash(self) -> str: ...  # noqa: D102

    @property
    def old_hash(self) -> str: ...  # noqa: D102

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of ``text``, ``[n]``, unsigned."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return :meth:`encode` of every text."""
        ...

    def for_corpus(self, special_tokens: str) -> CorpusEncoder:
        """Return an encoder for text of a corpus.

        Args:
            special_tokens: ``"split"``, ``"keep"`` or ``"refuse"``; see :mod:`statex_dist.data.special_tokens`. To
                refuse is the business of the caller; texts are split.
        """
        ...

    def template_start(self) -> list[int]:
        """Return the ids that the tokenizer's own template puts in front of a text; :meth:`encode` does not."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ``ids``; special tokens and undecodable bytes never raise."""
        ...

    def special_id(self, text: str) -> int | None:
        """Return the id of the special token that is written ``text``, or None: it is in no decoded text."""
        ...

    def is_special(self, token: int) -> bool:
        """Return whether the id is that of a special token."""
        ...

    def token_name(self, token: int) -> str:
        """Return how an id is written in messages."""
        ...

    def stands_alone(self, token: int) -> bool:
        """Return whether an id has text that no later token changes, but for a last character that is not whole.

        Special tokens and ids without a token have no text. Of a run of tokens that are decoded together, none stands
        alone.
        """
        ...

    def save(self, directory: str | Path) -> None:
        """Write into an existing ``directory`` what :func:`load_tokenizer` needs to load it from there."""
        ...


class BytesTokenizer:
    """UTF-8 bytes as ids 0..255, 256 = EOS, 257 = PAD."""

    spec = "bytes"
    vocab_size = 258
    bos_token_id = None
    eos_token_id = 256
    pad_token_id = 257
    hash = blake2b(b"statex bytes tokenizer: utf-8, eos 256, pad 257", digest_size=16).hexdigest()
    end_tokens: Mapping[int, Sequence[str]] = {eos_token_id: ("tokenizer",)}

    def encode(self, text: str) -> np.ndarray:
        """Return the UTF-8 bytes of ``text``, ``[n]`` uint16."""
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.uint16)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return :meth:`encode` of every text."""
        return [self.encode(text) for text in texts]

    def for_corpus(self, special_tokens: str) -> CorpusEncoder:
        """Return this tokenizer: no text becomes EOS or PAD."""
        return self

    @property
    def old_hash(self) -> str:
        """Same as ``hash``: bytes have no settings."""
        return self.hash

    def marker_in(self, text: str) -> None:
        """Return None: no special token is written as text."""

    def has_control(self, ids: np.ndarray) -> bool:
        """Return False: no text becomes EOS or PAD."""
        return False

    def template_start(self) -> list[int]:
        """Return nothing: there is no template."""
        return []

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of the byte ids; EOS and PAD are dropped, malformed UTF-8 becomes U+FFFD."""
        return bytes(int(i) for i in ids if int(i) < 256).decode("utf-8", errors="replace")

    def special_id(self, text: str) -> int | None:
        """Return None: EOS and PAD have no text."""
        return None

    def is_special(self, token: int) -> bool:
        """Return whether the id is EOS or PAD."""
        return token in (self.eos_token_id, self.pad_token_id)

    def token_name(self, token: int) -> str:
        """Return ``EOS``, ``PAD`` or the byte."""
        return {self.eos_token_id: "EOS", self.pad_token_id: "PAD"}.get(token, f"byte 0x{token:02x}")

    def stands_alone(self, token: int) -> bool:
        """Return whether the id is a byte."""
        return 0 <= token < 256

    def save(self, directory: str | Path) -> None:
        """Write the marker that makes ``directory`` recognised as a bytes-tokenised model."""
        config = {
            "tokenizer_class": _BYTES_CLASS,
            "vocab_size": self.vocab_size,
            "eos_token_id": self.eos_token_id,
            "pad_token_id": self.pad_token_id,
        }
        (Path(directory) / _MARKER).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


class HFTokenizer:
    """A Hugging Face *fast* tokenizer, used through its Rust backend.

    Args:
        tokenizer: A ``transformers.PreTrainedTokenizerFast``.
        spec: The directory it came from.

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
        control = ControlTokens(self._backend, self._special)
        if control.ordinary:
            names = ", ".join(sorted(control.ordinary)[:4])
            log.info("tokenizer %s: special tokens that are ordinary pieces too stay in text: %s", self.spec, names)
        if special_tokens == "keep" and self._backend.encode_special_tokens:
            log.warning("tokenizer %s has split_special_tokens: true, so markers are split, not kept", self.spec)
        return _CorpusText(control, self.encode_batch if special_tokens == "keep" else control.encode_split)

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


@dataclass(frozen=True, slots=True)
class _CorpusText:
    """A fast tokenizer under a rule for special tokens."""

    control: ControlTokens
    encode: Callable[[Sequence[str]], list[np.ndarray]]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of every text, ``[n]`` uint32."""
        return self.encode(texts)

    def marker_in(self, text: str) -> str | None:
        """Return the first marker of a special token in ``text``, or None."""
        return self.control.marker_in(text)

    def has_control(self, ids: np.ndarray) -> bool:
        """Return whether a control token is among the ids ``[n]`` of a text."""
        return self.control.has_control(ids)


def is_current_hash(found: str) -> bool:
    """Return whether a hash of a Hugging Face tokenizer has the format of this release."""
    return found.startswith(_HASH_FORMAT)


def _digest(text: str) -> str:
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _int_or_none(value: Any) -> int | None:
    return None if value is None else int(value)


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """Return the tokenizer that ``spec`` names. Nothing is downloaded.

    Args:
        spec: ``"bytes"``, or a directory with a bytes marker or a Hugging Face fast tokenizer (a model directory does).

    Raises:
        ConfigError: ``spec`` is neither.
        DataError: The directory's tokenizer cannot be loaded.
    """
    if str(spec) == "bytes":
        return BytesTokenizer()
    directory = Path(spec)
    if not directory.is_dir():
        raise ConfigError(f"tokenizer {str(spec)!r}: no such directory; allowed: 'bytes' or a tokenizer's directory")
    if is_bytes_tokenizer(directory):
        return BytesTokenizer()
    if not any((directory / name).is_file() for name in ("tokenizer.json", _MARKER, "tokenizer.model", "vocab.json")):
        raise ConfigError(f"tokenizer {str(spec)!r}: no tokenizer.json in it; give a tokenizer's directory or 'bytes'")
    try:
        loaded = _load_fast(directory)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        # transformers raises nearly any error for a damaged directory, and the tokenizers library panics, which is no
        # Exception; the user needs the directory and the first line.
        raise DataError(f"tokenizer {str(spec)!r} cannot be loaded: {reason(error)}") from error
    return HFTokenizer(loaded, str(spec))


def _load_fast(directory: Path) -> Any:
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


def has_tokenizer(directory: str | Path) -> bool:
    """Return whether :func:`load_tokenizer` can load ``directory``: a fast tokenizer's file, or the marker of bytes."""
    return (Path(directory) / "tokenizer.json").is_file() or is_bytes_tokenizer(directory)


def is_bytes_tokenizer(directory: str | Path) -> bool:
    """Return whether ``directory`` carries the marker of :class:`BytesTokenizer`.

    Raises:
        DataError: The directory's ``tokenizer_config.json`` is not JSON.
    """
    path = Path(directory) / _MARKER
    if not path.is_file():
        return False
    try:
        config = read_json(path)
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}") from error
    return isinstance(config, dict) and config.get("tokenizer_class") == _BYTES_CLASS


def write_tokenizer(tokenizer: Tokenizer, directory: str | Path) -> None:
    """Save ``tokenizer`` into ``directory`` (created if missing), so that ``load_tokenizer(directory)`` returns it."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    tokenizer.save(directory)
