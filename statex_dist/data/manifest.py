"""What ``statex prepare`` says about a dataset (``manifest.json``), and the lengths of all its documents.

``manifest.json`` is written last: a directory that holds one is complete. ``lengths.npy`` beside it lets every rank
plan an epoch without opening, or downloading, a shard.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from hashlib import blake2b
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np

from statex_dist.checkpoint.json_file import parse_json
from statex_dist.data.hf_tokenizer import is_current_hash
from statex_dist.data.storage.npy import read_npy
from statex_dist.data.tokenizer import BytesTokenizer, Tokenizer
from statex_dist.errors import DataError, one_line, shown

log = logging.getLogger(__name__)

MANIFEST_NAME = "manifest.json"
MANIFEST_VERSION = 3
_NAMED = 8
# Values of the keys that version 2 lacks: there the tokenizer turned markers in text into control tokens.
_VERSION_2 = {"bos": "none", "bos_token_id": None, "special_tokens": "keep", "special_token_documents": None}
LENGTHS_NAME = "lengths.npy"


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetManifest:
    """What ``prepare`` says about a dataset, in ``manifest.json`` beside the shards; written last.

    Attributes:
        version: Version of this file's layout.
        format: Shard format, ``"mds"`` or ``"wds"`` (webdataset's tar).
        tokenizer: What was given as tokenizer (``"bytes"`` or a directory; a hint, the hash decides).
        tokenizer_hash: :attr:`Tokenizer.hash`.
        vocab_size: One more than the largest id that may occur.
        eos_token_id: Id of EOS; None if the tokenizer has none.
        eos: ``"append"`` (every document ends with EOS) or ``"none"`` (documents are as they were).
        bos_token_id: Id of BOS; None if the tokenizer has none.
        bos: ``"prepend"`` (every document begins with BOS) or ``"none"`` (documents are as they were).
        special_tokens: How markers of special tokens in text were encoded: ``"split"``, ``"keep"`` or ``"refuse"``.
        special_token_documents: Documents whose text holds such a marker; None where it was not counted.
        documents: Number of documents.
        tokens: Number of tokens, EOS included.
        dtype: ``"uint16"`` or ``"uint32"``.
        loss_mask: Whether the shards have a ``loss_mask`` column.
        seed: Seed of the document shuffle.
        shard_documents: Documents of each shard.
        shard_tokens: Tokens of each shard.
        lengths_hash: :func:`hash_lengths` of ``lengths.npy``.
        length_histogram: Number of documents by length: entry ``k`` counts ``2**k <= n < 2**(k + 1)``.
        left_out: Documents left out, by reason: ``"short"``, ``"long"``, ``"filtered"``, ``"undecodable"``, ``"bad"``.
        rows: By ``"text"`` and ``"tokens"``, what input files held: ``files`` (how many), ``names`` (the first 100) and
            ``columns`` beside the ids that were honoured. Older manifests have none.
    """

    version: int = MANIFEST_VERSION
    format: str
    tokenizer: str
    tokenizer_hash: str
    vocab_size: int
    eos_token_id: int | None
    eos: str
    bos_token_id: int | None = None
    bos: str = "none"
    special_tokens: str = "split"
    special_token_documents: int | None = 0
    documents: int
    tokens: int
    dtype: str
    loss_mask: bool
    seed: int
    shard_documents: list[int]
    shard_tokens: list[int]
    lengths_hash: str
    length_histogram: list[int]
    left_out: dict[str, int]
    rows: dict[str, Any] = field(default_factory=dict)

    def write(self, directory: Path) -> None:
        """Write the manifest into ``directory``; the caller makes the directory durable."""
        (directory / MANIFEST_NAME).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def parse_manifest(content: bytes, origin: str) -> DatasetManifest:
    """Return the manifest in ``content``.

    Raises:
        DataError: It is not a manifest that this version reads.
    """
    try:
        found: Any = parse_json(content)
    except ValueError as error:
        raise DataError(f"{origin} is unreadable: {one_line(error)}; prepare the dataset again") from None
    if not isinstance(found, dict):
        raise DataError(f"{origin} holds no JSON object ({type(found).__name__}); prepare the dataset again")
    version = found.get("version")
    if type(version) is not int or version not in (2, MANIFEST_VERSION):
        raise DataError(
            f"{origin}: version {shown(version, 60)} is not supported (2 and {MANIFEST_VERSION} are); prepare the "
            "dataset again"
        )
    if version == 2:
        found = found | _VERSION_2
    found.setdefault("rows", {})
    if wrong := sorted(set(found) ^ {one.name for one in fields(DatasetManifest)}):
        raise DataError(f"{origin}: missing or unknown keys: {', '.join(wrong[:_NAMED])}; prepare the dataset again")
    for name, kind in get_type_hints(DatasetManifest).items():
        if not _is_a(found[name], kind):
            wanted = kind.__name__ if get_origin(kind) is None and isinstance(kind, type) else kind
            raise DataError(
                f"{origin}: {name} is {shown(found[name], 60)}, not of type {wanted}; restore it or prepare the "
                "dataset again"
            )
    return DatasetManifest(**found)


def _is_a(value: Any, kind: Any) -> bool:
    """Whether ``value``, from JSON, has the type of a manifest's field; a bool is no int."""
    if isinstance(kind, UnionType):
        return any(_is_a(value, part) for part in get_args(kind))
    if kind == list[int]:
        return isinstance(value, list) and all(type(item) is int for item in value)
    if kind == dict[str, int]:
        return isinstance(value, dict) and all(type(item) is int for item in value.values())
    if kind == dict[str, Any]:
        return isinstance(value, dict)
    return type(value) is kind


def hash_lengths(lengths: np.ndarray) -> str:
    """Return a digest of documents' lengths ``[documents]``, in stored order."""
    return blake2b(lengths.astype("<u4").tobytes(), digest_size=16).hexdigest()


def pack_lengths(lengths: np.ndarray) -> bytes:
    """Return ``[documents]`` lengths as the bytes of a ``.npy`` file of uint32."""
    out = io.BytesIO()
    np.save(out, lengths.astype("<u4"))
    return out.getvalue()


def read_lengths(path: Path, documents: int, expected_hash: str) -> np.ndarray:
    """Return the lengths in ``path``, ``[documents]`` uint32.

    Raises:
        DataError: The file is missing or damaged, or not of these documents.
    """
    try:
        lengths = read_npy(path, "uint32", (documents,))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} is not a readable list of lengths ({error}); restore it or prepare the dataset again"
        ) from error
    if hash_lengths(lengths) != expected_hash:
        raise DataError(f"{path} does not belong to the manifest beside it; restore it or prepare the dataset again")
    return lengths


def is_hash_of(tokenizer: Tokenizer, found: str) -> bool:
    """Return whether a hash is that of ``tokenizer``, as this release or an earlier one writes it."""
    return found in (tokenizer.hash, tokenizer.old_hash)


def check_same_tokenizer(manifests: Mapping[str, DatasetManifest], own: Tokenizer | None) -> None:
    """Compare the tokenizers of datasets with each other and with the model's, and how documents were made.

    Raises:
        DataError: Two of them differ.
    """
    first: tuple[str, DatasetManifest] | None = None
    for path, manifest in manifests.items():
        if manifest.version < MANIFEST_VERSION:
            log.info(
                "%s was prepared by an earlier release: markers of special tokens in its text are control tokens", path
            )
        if own is not None:
            fits, other = is_hash_of(own, manifest.tokenizer_hash), own.spec
        elif first is None:
            fits, other = True, ""
        else:
            fits, other = _same(first, (path, manifest)), first[1].tokenizer
        if not fits:
            raise DataError(
                f"{path} was made with another tokenizer ({manifest.tokenizer}) than the one in {other}; "
                f"prepare the text again with --tokenizer {other}"
            )
        first = first or (path, manifest)
        for name in ("bos", "eos", "special_tokens"):
            here, there = getattr(manifest, name), getattr(first[1], name)
            if here != there:
                log.warning("%s was prepared with %s %s, %s with %s", path, name, here, first[0], there)


def _same(one: tuple[str, DatasetManifest], other: tuple[str, DatasetManifest]) -> bool:
    hashes = [manifest.tokenizer_hash for _, manifest in (one, other)]
    if hashes[0] == hashes[1] or BytesTokenizer.hash in hashes:
        return hashes[0] == hashes[1]
    if is_current_hash(hashes[0]) == is_current_hash(hashes[1]):
        return False
    facts = [(manifest.vocab_size, manifest.eos_token_id) for _, manifest in (one, other)]
    log.warning(
        "%s and %s were prepared by different releases, so their tokenizers cannot be compared; prepare the older one "
        "again",
        one[0],
        other[0],
    )
    return facts[0] == facts[1]
