"""Tokenizers: raw bytes (no file needed) and Hugging Face fast tokenizers from a local directory.

A directory says by itself which one it holds: ``tokenizer_config.json`` with ``"tokenizer_class": "BytesTokenizer"``
marks bytes, anything else is left to ``transformers``. A model directory can carry either.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Protocol

import numpy as np

from statex_dist.checkpoint.json_file import read_json
from statex_dist.data.hf_tokenizer import HFTokenizer, load_fast
from statex_dist.data.special_tokens import CorpusEncoder
from statex_dist.errors import ConfigError, DataError, reason

_MARKER = "tokenizer_config.json"
_BYTES_CLASS = "BytesTokenizer"


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

    spec: str
    vocab_size: int
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None
    hash: str
    end_tokens: Mapping[int, Sequence[str]]

    @property
    def old_hash(self) -> str: ...  # noqa: D102 - documented by the class

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
    bos_token_id: int | None = None
    eos_token_id: int | None = 256
    pad_token_id: int | None = 257
    hash = blake2b(b"statex bytes tokenizer: utf-8, eos 256, pad 257", digest_size=16).hexdigest()
    end_tokens: Mapping[int, Sequence[str]] = {256: ("tokenizer",)}

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
        loaded = load_fast(directory)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        # transformers raises nearly any error for a damaged directory, and the tokenizers library panics, which is no
        # Exception; the user needs the directory and the first line.
        raise DataError(f"tokenizer {str(spec)!r} cannot be loaded: {reason(error)}") from error
    return HFTokenizer(loaded, str(spec))


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
