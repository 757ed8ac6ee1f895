"""Small files of a target: ``config.json`` with its dtype, the report of an expansion, and carried files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from statex_dist.checkpoint.dtypes import FLOATS, TORCH_NAMES
from statex_dist.checkpoint.formats.places import check_link, trainer_files
from statex_dist.checkpoint.formats.tensor_io import TensorInfo, TensorSource
from statex_dist.checkpoint.json_file import config_text, read_json
from statex_dist.errors import CheckpointError, reason
from statex_dist.models.config import CONFIG_NAME

CARRIED = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tekken.json",
    "*.tiktoken",
    "chat_template*",
    "vocab*",
    "merges*",
    "*.model",
    "*.py",
    "LICENSE*",
)
"""Files of a model directory that go along with its weights."""

DTYPE_KEYS = ("dtype", "torch_dtype")
"""Where ``config.json`` names the dtype of the weights: as transformers 5 writes it, and as 4 did."""


def with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Return a ``config.json`` that names the dtype in which the weights are stored, once.

    The key is the one that the contents have; ``dtype`` where they have both, ``torch_dtype``, which every release
    reads, where they have neither.
    """
    key = next((key for key in DTYPE_KEYS if key in config), "torch_dtype")
    return {**{k: v for k, v in config.items() if k not in DTYPE_KEYS}, key: TORCH_NAMES[dtype]}


def with_one_dtype(config: dict[str, Any], source: TensorSource) -> dict[str, Any]:
    """Return a ``config.json`` with one dtype: where its two keys differ, one is left and names the stored dtype."""
    if len({config[key] for key in DTYPE_KEYS if isinstance(config.get(key), str)}) < 2:
        return config
    stored = main_dtype([replace(source.info(name), dtype=source.natural_dtype(name)) for name in source.owned()])
    return config if stored is None else with_dtype(config, stored)


def float_dtypes(infos: Iterable[TensorInfo]) -> list[str]:
    """Return the floating-point dtypes of tensors, that of most bytes first."""
    sizes: dict[str, int] = {}
    for info in infos:
        if info.dtype in FLOATS:
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
    return sorted(sizes, key=lambda dtype: (sizes[dtype], TORCH_NAMES[dtype]), reverse=True)


def main_dtype(infos: Iterable[TensorInfo]) -> str | None:
    """Return the floating-point dtype of most bytes, or None of a checkpoint without any."""
    return next(iter(float_dtypes(infos)), None)


REPORT_NAME = "expansion_report.json"


def read_report(directory: Path) -> dict[str, Any] | None:
    """Return the contents of a directory's report, or None where it has none.

    Raises:
        CheckpointError: The report is unreadable.
    """
    path = directory / REPORT_NAME
    try:
        content = read_json(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {reason(error)}") from None
    if not isinstance(content, dict) or not isinstance(content.get("tensors"), dict):
        raise CheckpointError(f"{path} is not an expansion report: it holds no mapping 'tensors'")
    if not all(isinstance(row, dict) for row in content["tensors"].values()):
        raise CheckpointError(f"{path} is not an expansion report: an entry of 'tensors' is not a mapping")
    return content


def encoded(name: str, content: Any) -> bytes:
    """Return the bytes of a document: texts and bytes as they are, anything else as JSON."""
    if isinstance(content, bytes):
        return content
    if isinstance(content, str):
        return content.encode()
    text = config_text(content) if Path(name).name == CONFIG_NAME else json.dumps(content, indent=2) + "\n"
    return text.encode()


def carried_files(directory: Path | None) -> list[Path]:
    """Return the files of a model directory that are carried along, each once.

    Raises:
        CheckpointError: One of them is a link to a file elsewhere.
    """
    if directory is None:
        return []
    found = {path for pattern in CARRIED for path in directory.glob(pattern)}
    others = {CONFIG_NAME} | trainer_files(directory)
    carried = sorted(path for path in found if path.is_file() and path.name not in others)
    for path in carried:
        check_link(path, directory)
    return carried
