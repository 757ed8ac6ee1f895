"""Check that datasets, and a model, belong to one tokenizer."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from statex_dist.data.manifest import MANIFEST_VERSION, DatasetManifest
from statex_dist.data.tokenizer import BytesTokenizer, Tokenizer, is_current_hash
from statex_dist.errors import DataError

log = logging.getLogger(__name__)


def is_hash_of(tokenizer: Tokenizer, found: str) -> bool:
    """Return whether a hash is that of ``tokenizer``, as this release or an earlier one writes it."""
    return found in (tokenizer.hash, tokenizer.old_hash)


def check_same_tokenizer(manifests: Mapping[str, DatasetManifest], own: Tokenizer | None) -> None:
    """Compare the tokenizers of datasets with each other and with the model's, and how documents were made.

    Args:
        manifests: What the datasets say of themselves, by their places.
        own: The model's tokenizer; None if it has none.

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
