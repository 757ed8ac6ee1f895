"""Data that every machine has: recall documents by formula, and the Python standard library's own sources as text."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from statex_dist.errors import DataError
from statex_dist.evaluation.mqar import generate_mqar

PIECE_BYTES = 1_000


def library_pieces(count: int, *, length: int = PIECE_BYTES) -> list[str]:
    """Return different pieces of the Python standard library's own sources, a text that every machine has."""
    pieces: list[str] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        if text.isascii():
            pieces += [text[i : i + length] for i in range(0, len(text) - length, length)]
    pieces = list(dict.fromkeys(pieces))  # Debian has one generated file under two names
    if len(pieces) < count:
        raise DataError(f"this Python has too few sources in its standard library: {len(pieces)} pieces of {count}")
    order = np.random.default_rng(0).permutation(len(pieces))
    return [pieces[i] for i in order[:count]]


def recall_documents(pairs: tuple[int, ...], num_tokens: int) -> list[dict[str, Any]]:
    """Return recall documents with equal numbers of tokens for every number of pairs; only the answers carry loss."""
    documents: list[dict[str, Any]] = []
    for num_pairs in pairs:
        count = max(1, num_tokens // len(pairs) // (4 * num_pairs))
        # The evaluation draws with seed 0.
        tokens, mask = generate_mqar(num_pairs, count, seed=12345)
        documents += [
            {"input_ids": row.tolist(), "loss_mask": answers.tolist()}
            for row, answers in zip(tokens, mask, strict=True)
        ]
    return documents


def write_sources(folder: Path, name: str, **rows: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Write JSON lines, a file for each kind of rows that has any, since ``prepare`` takes one kind per file.

    Args:
        folder: An existing directory.
        name: Start of the files' names.
        rows: The rows by kind, which ends the file's name.

    Returns:
        The files, in the order of ``rows``.
    """
    paths = {folder / f"{name}-{kind}.jsonl": records for kind, records in rows.items() if records}
    for path, records in paths.items():
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return list(paths)
