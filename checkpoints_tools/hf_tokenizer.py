"""A tokenizer that transformers opens, for models of raw bytes, which have a marker that only our own tools understand.

The form is the tokenizers library's: byte-level BPE without merges, so that every UTF-8 byte is the token of its value.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from statex_dist.errors import CheckpointError

TOKENIZER_NAME = "tokenizer.json"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"

_CODE_MODULE = "tokenization_statex"
BYTES_CODE_NAME = f"{_CODE_MODULE}.py"
_CODE = Path(__file__).with_name("remote_code") / "bytes_tokenizer.py"

BYTES_CLASS = "BytesTokenizer"
"""The ``tokenizer_class`` that marks bytes."""

_EOS, _PAD = (256, "<|endoftext|>"), (257, "<|pad|>")


def read_tokenizer_config(directory: Path | None) -> dict[str, Any]:
    """Return the contents of a directory's ``tokenizer_config.json``, nothing where it has none.

    Raises:
        CheckpointError: It is damaged.
    """
    path = None if directory is None else directory / TOKENIZER_CONFIG_NAME
    if path is None or not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
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
