"""Megatron (``torch_dist``) and other torch distributed checkpoints: laying them out, and reading them as one model.

megatron-core's ``dist_checkpointing.load`` opens what we write, for any number of ranks, and so does plain
``torch.distributed.checkpoint.load``. We need neither of them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from checkpoints_tools.dcp_chunks import Places, Strided, open_chunks
from checkpoints_tools.dcp_format import METADATA_NAME, lay_out, metadata_bytes, read_metadata
from checkpoints_tools.journal import WrittenTensor
from checkpoints_tools.megatron_names import (
    EMBEDDINGS,
    HEAD,
    OTHER_STATE,
    Part,
    has_megatron_names,
    megatron_name,
    name_map,
    whole,
)
from checkpoints_tools.target import Documents, TargetPlan
from checkpoints_tools.tensor_io import Held, Piece, Pieces, SourceFacts, TensorInfo, TensorSource
from checkpoints_tools.torch_zip import TorchArchive, archive_bytes
from checkpoints_tools.transfer import TensorJob
from statex_dist.checkpoint.json_file import read_json
from statex_dist.errors import CheckpointError, reason, shown
from statex_dist.models.config import CONFIG_NAME, ModelConfig, read_config_dict
from statex_dist.models.kinds import config_from_dict, family_of, find_family

logger = logging.getLogger(__name__)
CONFIG_FILE = "metadata.json"
"""megatron-core's own file, which says in which format the rest is; DCP of others lack it."""

COMMON_FILE = "common.pt"

CHECKPOINT_CONFIG = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}

SIDE_FILES = (METADATA_NAME, CONFIG_FILE, COMMON_FILE)
"""Files of a checkpoint beside its ``.distcp`` files."""

_CHECKPOINT_VERSION = 3.0  # of older ones Megatron-LM reorders queries and keys
_MAX_JSON_BYTES = 1 << 20


def megatron_plan(
    source: TensorSource,
    jobs: Sequence[TensorJob],
    *,
    config: ModelConfig | None,
    max_shard_size: int,
    documents: Documents,
    info: dict[str, Any],
) -> TargetPlan:
    """Lay tensors out in a Megatron checkpoint.

    Args:
        source: Whose step goes along.
        jobs: Every tensor, in order.
        config: The model's config, which decides on names; None where it is not of one of our families.
        max_shard_size: Bytes of values per file; the parts of a tensor stay in one file.
        documents: Makes the JSON files (``config.json`` among them) when all files are written.
        info: Facts for the manifest.

    Raises:
        CheckpointError: A tensor has no name there, is missing, or has a dtype that torch's storages lack.
    """
    parts = _parts_of([job.info for job in jobs], config)
    layout = lay_out([[_of_part(job.info, p) for p in parts[job.info.name]] for job in jobs], max_shard_size)
    metadata = metadata_bytes(layout.tensors)
    step = source.facts.info.get("step") or 0
    common = archive_bytes(Path(COMMON_FILE).stem, {"checkpoint_version": _CHECKPOINT_VERSION, "iteration": step})

    def places(job: TensorJob) -> list[Piece]:
        row = math.prod(job.info.shape[1:])
        return [Piece(*layout.values[p.name], p.start * row, p.stop * row) for p in parts[job.info.name]]

    def with_metadata(written: Mapping[str, WrittenTensor]) -> dict[str, Any]:
        own = {COMMON_FILE: common, METADATA_NAME: metadata, CONFIG_FILE: CHECKPOINT_CONFIG}
        return {**documents(written), **own}

    return TargetPlan(
        kind="megatron",
        files=layout.files,
        jobs=jobs,
        places=places,
        documents=with_metadata,
        info={**info, "megatron_names": config is not None and has_megatron_names(config)},
    )


def _parts_of(infos: Sequence[TensorInfo], config: ModelConfig | None) -> dict[str, tuple[Part, ...]]:
    """Return the parts of every tensor that is written, by our name."""
    table = name_map(config) if config is not None else {}
    found = {}
    for info in infos:
        if info.name in table:
            found[info.name] = table[info.name]
            rows = found[info.name][-1].stop
            if rows != (info.shape[0] if info.shape else 1):
                raise CheckpointError(f"tensor '{info.name}' has shape {list(info.shape)}; {rows} rows are expected")
        else:
            # The head of a tied model, or what the family's layout does not list.
            renamed = config is not None and has_megatron_names(config)
            name = megatron_name(config, info.name) if config is not None and renamed else info.name
            found[info.name] = (whole(name, info.shape),)
    if missing := [name for name in table if name not in found]:
        raise CheckpointError(f"tensor '{missing[0]}' is missing: --to megatron needs every tensor")
    return found


def _of_part(info: TensorInfo, part: Part) -> TensorInfo:
    shape = (part.stop - part.start, *info.shape[1:]) if info.shape else ()
    return TensorInfo(name=part.name, shape=shape, dtype=info.dtype)


def looks_like_megatron(directory: Path) -> bool:
    """Return whether a directory holds a torch distributed checkpoint, Megatron's or another."""
    return (directory / METADATA_NAME).is_file()


class MegatronSource(TensorSource):
    """A torch distributed checkpoint; with a ``config.json`` of one of our families as that model, else as it is.

    Attributes:
        ignored: Names of entries that are left out: pickled objects and what Megatron keeps of the optimizer.

    Args:
        directory: The directory with ``.metadata``.
        facts: What is known of it besides; None for what the directory itself tells.

    Raises:
        CheckpointError: A file is missing, damaged or refused, chunks do not make up the tensors, or the tensors are
            not those of the model in ``config.json``.
    """

    def __init__(self, directory: Path, facts: SourceFacts | None = None):
        _check_backend(directory / CONFIG_FILE)
        contents = read_metadata(directory / METADATA_NAME)
        self._tensors, self._archives = open_chunks(directory, contents.tensors.values())
        infos = {name: tensor.info for name, tensor in contents.tensors.items()}
        ignored = list(contents.ignored)
        facts = facts or SourceFacts.of_directory("megatron", directory)
        values = read_config_dict(facts.model_dir) if facts.model_dir is not None else {}
        if find_family(values):
            infos, self._tensors, others = _joined(infos, self._tensors, config_from_dict(values), directory)
            ignored += others
        self.ignored = tuple(ignored)
        if ignored:
            logger.info("%s: %d entries are not tensors of the model and are left out", directory, len(ignored))
        super().__init__(facts, infos, [directory / METADATA_NAME, *(archive.path for archive in self._archives)])

    def pieces(self, name: str) -> Pieces:
        """Return where a tensor lies: a piece for each chunk."""
        found = [piece.held() if isinstance(piece, Strided) else piece for piece in self._tensors[name]]
        return found or [Held(0, b"")]

    def archives(self) -> Iterable[TorchArchive]:
        """Return the files: their entries are the storages of all their chunks."""
        return self._archives


def _check_backend(path: Path) -> None:
    """Raise if Megatron says that the checkpoint is of a format of another kind."""
    if not path.is_file():
        return
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ValueError(f"it is larger than {_MAX_JSON_BYTES} bytes")
        backend = read_json(path)["sharded_backend"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {reason(error)}") from None
    if backend != CHECKPOINT_CONFIG["sharded_backend"]:
        raise CheckpointError(f"{path} names the format {shown(backend)}; only torch_dist is read")


def _joined(
    infos: Mapping[str, TensorInfo], places: Places, config: ModelConfig, directory: Path
) -> tuple[dict[str, TensorInfo], Places, list[str]]:
    """Return the tensors of a model and where they lie, from the parts that a checkpoint has of them.

    Returns:
        Tensors by our name, their places, and the names that are left out.

    Raises:
        CheckpointError: Parts are missing, left over, or do not fit together.
    """
    table = name_map(config)
    used = {part.name for parts in table.values() for part in parts}
    if set(table) <= set(infos) or not used & set(infos):
        # Our names as they are, or nothing of the model: who needs its tensors will say what is missing.
        return dict(infos), places, []
    head = family_of(config.MODEL_TYPE).names.head
    if has_megatron_names(config) and head not in table and HEAD in infos:
        table[head] = (whole(HEAD, infos[HEAD].shape),)
        used.add(HEAD)
    left_out = [name for name in infos if name not in used and name.startswith(OTHER_STATE)]
    others = [name for name in infos if name not in used and not name.startswith(OTHER_STATE)]
    if others and has_megatron_names(config):
        raise CheckpointError(
            f"{directory} holds tensor '{others[0]}', unknown to the {config.MODEL_TYPE} model in {CONFIG_NAME}"
        )
    made: dict[str, TensorInfo] = {}
    found: Places = {}
    for name, parts in table.items():
        made[name], found[name] = _join(name, parts, infos, places, directory)
    for name in others:
        made[name], found[name] = infos[name], places[name]
    return made, found, left_out


def _join(
    name: str, parts: Sequence[Part], infos: Mapping[str, TensorInfo], places: Places, directory: Path
) -> tuple[TensorInfo, list[Piece | Strided]]:
    """Return one tensor and where it lies."""
    if missing := [part.name for part in parts if part.name not in infos]:
        raise CheckpointError(f"{directory} lacks tensor '{missing[0]}', which is needed for '{name}'")
    first = infos[parts[0].name]
    row = math.prod(first.shape[1:])
    found: list[Piece | Strided] = []
    for part in parts:
        info, rows = infos[part.name], part.stop - part.start
        # Megatron fills the vocabulary up, to a multiple of 128 and of the ranks.
        padded = part.name in (EMBEDDINGS, HEAD) and info.shape and info.shape[0] > rows
        if _of_part(info, part) != info and not padded:
            raise CheckpointError(
                f"{directory}: tensor '{part.name}' has shape {list(info.shape)}; {rows} rows of '{name}' are expected"
            )
        if info.shape[1:] != first.shape[1:] or info.dtype != first.dtype:
            raise CheckpointError(f"{directory}: the parts of '{name}' differ in shape or dtype")
        for piece in places[part.name]:
            if isinstance(piece, Strided):
                found.append(replace(piece, start=piece.start + part.start * row))
                continue
            shift, end = part.start * row // piece.width, part.stop * row // piece.width
            moved = replace(piece, start=piece.start + shift, stop=min(piece.stop + shift, end))
            found += [moved] if moved.start < moved.stop else []
    shape = (parts[-1].stop, *first.shape[1:]) if first.shape else ()
    return TensorInfo(name=name, shape=shape, dtype=first.dtype), found
