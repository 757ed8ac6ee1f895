"""Where model and data meet: tokenizer, vocabulary, and the files that make a checkpoint a model."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from statex_dist.checkpoint.formats.places import check_link
from statex_dist.checkpoint.json_file import config_text
from statex_dist.data.manifest import check_same_tokenizer
from statex_dist.data.store import ShardStore
from statex_dist.data.tokenizer import has_tokenizer, load_tokenizer
from statex_dist.errors import ConfigError, DataError
from statex_dist.models.config import CONFIG_NAME, ModelConfig

logger = logging.getLogger(__name__)

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenization_statex.py",
    "generation_config.json",
)


def check_data(model: ModelConfig, source: Path | None, stores: Mapping[str, ShardStore]) -> int:
    """Check that data was made for a model; return the id of padding.

    Args:
        model: The model.
        source: Directory of the model that the run begins with; None for a new one.
        stores: The data by place, that of the training before that of the validation.

    Raises:
        DataError: It was tokenized with another tokenizer or for a larger vocabulary than the model's.
    """
    own = load_tokenizer(str(source)) if source is not None and has_tokenizer(source) else None
    manifests = {path: store.manifest for path, store in stores.items() if store.manifest is not None}
    for path, manifest in manifests.items():
        if manifest.vocab_size > model.vocab_size:
            raise DataError(
                f"{path} uses a vocabulary of {manifest.vocab_size} ({manifest.tokenizer}); "
                f"the model's has {model.vocab_size}"
            )
    check_same_tokenizer(manifests, own)
    pad = model.pad_token_id if model.pad_token_id is not None else 0
    if not 0 <= pad < model.vocab_size:
        raise ConfigError(f"pad_token_id={pad} of the model is outside its vocabulary of {model.vocab_size}")
    return pad


def describe_model(
    model: ModelConfig, source: Path | None, stores: Mapping[str, ShardStore], *, rank: int = 0
) -> dict[str, str]:
    """Return the files that make a checkpoint a model: ``config.json`` and those of the tokenizer.

    Only those of rank 0 are written, and only it warns that a tokenizer is missing.

    Args:
        model: The model.
        source: Directory of the model that the run begins with; None for a new one.
        stores: The training data by name.
        rank: This process.
    """
    files = {CONFIG_NAME: config_text(model.to_dict())}
    if source is not None:
        files |= _read_files(source, TOKENIZER_FILES)
        if has_tokenizer(source):
            return files
    manifest = next((store.manifest for store in stores.values() if store.manifest is not None), None)
    if manifest is not None and (manifest.tokenizer == "bytes" or Path(manifest.tokenizer).is_dir()):
        with tempfile.TemporaryDirectory() as directory:
            load_tokenizer(manifest.tokenizer).save(directory)
            files |= _read_files(Path(directory), TOKENIZER_FILES)
    elif rank == 0:
        logger.warning("no tokenizer found beside the model or the data: checkpoints will hold none")
    return files


def _read_files(directory: Path, names: Iterable[str]) -> dict[str, str]:
    found = [directory / name for name in names if (directory / name).is_file()]
    for path in found:
        check_link(path, directory)
    return {str(path.relative_to(directory)): path.read_text(encoding="utf-8") for path in found}
