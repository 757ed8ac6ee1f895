"""Common parts of the tests of ``statex prepare``."""

import json
from functools import partial
from pathlib import Path

import pytest

from statex_dist.data.corpus.documents import split_units
from statex_dist.data.formats import open_store
from statex_dist.data.store import sequential_documents
from statex_dist.data.tokenizer import BytesTokenizer

EOS = 256


def texts_of(path: Path) -> list[str]:
    """The documents of a dataset in stored order; each must end with the only EOS in it."""
    found = []
    for piece in sequential_documents(open_store(path)):
        assert piece.tokens[-1] == EOS
        assert (piece.tokens[:-1] < EOS).all()
        found.append(BytesTokenizer().decode(piece.tokens))
    return found


def files_of(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def put(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def json_lines(*records: dict) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def split_small(monkeypatch: pytest.MonkeyPatch, unit_bytes: int) -> None:
    """Have ``prepare`` cut its inputs into units of ``unit_bytes`` bytes."""
    monkeypatch.setattr("statex_dist.data.corpus.source.split_units", partial(split_units, unit_bytes=unit_bytes))
