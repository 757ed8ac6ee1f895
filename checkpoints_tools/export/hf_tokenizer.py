"""Tokenizers of exports: which one a model has, one that it is given, and one for models of raw bytes.

Those have a marker that only our own tools understand. What transformers opens instead has the form of the tokenizers
library: byte-level BPE without merges, so that every UTF-8 byte is the token of its value.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from statex_dist.checkpoint.formats.places import check_link
from statex_dist.checkpoint.json_file import read_json
from statex_dist.errors import CheckpointError, ConfigError, reason

TOKENIZER_NAME = "tokenizer.json"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"

_CODE_MODULE = "tokenization_statex"
BYTES_CODE_NAME = f"{_CODE_MODULE}.py"
_CODE = Path(__file__).with_name("remote_code") / "bytes_tokenizer.py"

BYTES_CLASS = "BytesTokenizer"
"""The ``tokenizer_class`` that marks bytes."""

_EOS, _PAD = (256, "<|endoftext|>"), (257, "<|pad|>")
_BYTES_SIZE = 258
_BYTES_MARKER = {
    **{"tokenizer_class": BYTES_CLASS, "vocab_size": _BYTES_SIZE},
    **{"eos_token_id": _EOS[0], "pad_token_id": _PAD[0]},
}

Kind = Literal["bytes", "fast", "files"]
"""Of a tokenizer: raw bytes, a ``tokenizer.json``, or whatever other files say."""

_VOCABULARIES = (TOKENIZER_NAME, "tokenizer.model", "tekken.json", "*.tiktoken", "vocab*")
_BESIDE = (
    TOKENIZER_CONFIG_NAME,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "merges*",
    "token*.py",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class GivenTokenizer:
    """A tokenizer for a model that has none.

    Attributes:
        config: Contents of ``tokenizer_config.json``.
        files: Its files by name; none of that of bytes, which is made (:func:`bytes_tokenizer_documents`).
    """

    config: dict[str, Any]
    files: dict[str, bytes] = field(default_factory=dict)


def given_tokenizer(spec: str, *, vocab_size: int) -> GivenTokenizer:
    """Read the tokenizer that an option names.

    Args:
        spec: ``bytes``, or a directory with a tokenizer.
        vocab_size: Of the model.

    Raises:
        ConfigError: It is neither, or the tokenizer has ids that the model does not know.
        CheckpointError: A file is damaged, or a link to a file elsewhere.
    """
    directory = Path(spec)
    config = _BYTES_MARKER if spec == "bytes" else read_tokenizer_config(directory)
    if config.get("tokenizer_class") == BYTES_CLASS:
        files, size = {}, _BYTES_SIZE
    elif not (directory / TOKENIZER_NAME).is_file():
        raise ConfigError(f"--tokenizer {spec}: no {TOKENIZER_NAME} there; give bytes, or a fast tokenizer's directory")
    else:
        paths = {path for pattern in (*_VOCABULARIES, *_BESIDE) for path in directory.glob(pattern) if path.is_file()}
        for path in paths:
            check_link(path, directory)
        files = {path.name: path.read_bytes() for path in sorted(paths)}
        size = _vocab_size(directory / TOKENIZER_NAME)
    if size > vocab_size:
        raise ConfigError(f"--tokenizer {spec} has {size:,} tokens, the model's vocabulary {vocab_size:,}")
    return GivenTokenizer(config=config, files=files)


def tokenizer_kind(directory: Path | None, given: GivenTokenizer | None = None) -> Kind | None:
    """Return what kind of tokenizer a model directory has, or the model is given; None where there is none.

    Raises:
        CheckpointError: ``tokenizer_config.json`` is damaged.
    """
    config = read_tokenizer_config(directory) if given is None else given.config
    if config.get("tokenizer_class") == BYTES_CLASS:
        return "bytes"
    if given is not None or (directory is not None and (directory / TOKENIZER_NAME).is_file()):
        return "fast"
    found = [path for pattern in _VOCABULARIES for path in directory.glob(pattern)] if directory is not None else []
    return "files" if any(path.is_file() for path in found) else None


def _vocab_size(path: Path) -> int:
    """Return one more than the largest id in a ``tokenizer.json``."""
    try:
        values = read_json(path)
        vocabulary = values["model"]["vocab"]
        ids = range(len(vocabulary)) if isinstance(vocabulary, list) else vocabulary.values()
        added = [token["id"] for token in values.get("added_tokens") or ()]
        return max([*ids, *added], default=-1) + 1
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a tokenizer of the tokenizers library: {reason(error)}") from None


def read_tokenizer_config(directory: Path | None) -> dict[str, Any]:
    """Return the contents of a directory's ``tokenizer_config.json``, nothing where it has none.

    Raises:
        CheckpointError: It is damaged.
    """
    path = None if directory is None else directory / TOKENIZER_CONFIG_NAME
    if path is None or not path.is_file():
        return {}
    try:
        values = read_json(path)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {reason(error)}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return values


def bytes_tokenizer_documents(config: dict[str, Any]) -> dict[str, Any]:
    """Return ``tokenizer.json``, the class of the marker's name, and a ``tokenizer_config.json`` that knows of both.

    Special tokens are ids alone: text that looks like one is encoded as the bytes that it is.

    Args:
        config: The marker, whose own keys stay.
    """
    special = [
        {
            **{"id": number, "content": text, "single_word": False, "lstrip": False, "rstrip": False},
            **{"normalized": False, "special": True},
        }
        for number, text in (_EOS, _PAD)
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    tokenizer = {
        **{"version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "normalizer": None},
        **{"pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level},
        "model": {
            **{"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None},
            **{"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False},
            **{"vocab": {symbol: byte for byte, symbol in enumerate(_byte_symbols())}, "merges": []},
        },
    }
    settings = {
        **{"eos_token": _EOS[1], "pad_token": _PAD[1], "padding_side": "left"},
        # transformers would add token_type_ids, which its own Mamba2 refuses.
        "model_input_names": ["input_ids", "attention_mask"],
        **{"split_special_tokens": True, "clean_up_tokenization_spaces": False},
        "auto_map": {"AutoTokenizer": [None, f"{_CODE_MODULE}.{BYTES_CLASS}"]},
    }
    return {
        TOKENIZER_NAME: tokenizer,
        TOKENIZER_CONFIG_NAME: {**settings, **config},
        BYTES_CODE_NAME: _CODE.read_text(encoding="utf-8"),
    }


def _byte_symbols() -> list[str]:
    """Return the character that stands for each byte in a byte-level vocabulary (GPT-2's table).

    Bytes that print stand for themselves; the others take the characters from 256 on, in order.
    """
    printing = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printing else next(others)) for byte in range(256)]
