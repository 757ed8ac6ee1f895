"""A rank's own file of a directory of tensor-parallel shards, held to everything that is known of it before it is used.

A shard of another model has the same names and shapes, and nothing fails when it is run. So a file must be the one that
the directory's manifest describes, what each rank holds must be what the model's config asks for, and what all ranks
hold must be the same on all of them.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open

from statex_dist.checkpoint.config_json import differing_keys
from statex_dist.checkpoint.layout import MANIFEST_NAME
from statex_dist.checkpoint.manifest import Manifest, digest_file
from statex_dist.checkpoint.tp_layout import LAYOUT_NAME, TensorParallelLayout, check_place
from statex_dist.errors import CheckpointError, ConfigError
from statex_dist.models.config import CONFIG_NAME, ModelConfig
from statex_dist.models.kinds import family_of
from statex_dist.models.layout import TensorSpec, rows_by_part, shard_ranges
from statex_dist.parallel.tensor_share import TensorShare

logger = logging.getLogger(__name__)


def read_layout(directory: Path, share: TensorShare) -> TensorParallelLayout:
    """Return what a directory says of its shards.

    Raises:
        CheckpointError: It holds none.
        ConfigError: They are for another number of ranks.
    """
    path = directory / LAYOUT_NAME
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory; give one that statex reshard --to tp made")
    if not path.is_file():
        raise CheckpointError(
            f"{directory} holds no {LAYOUT_NAME}: it is no directory of tensor-parallel shards; make one with "
            f"statex reshard --source {directory} --target NEW_DIR --to tp --tp {share.size}"
        )
    layout = TensorParallelLayout.read(path)
    if layout.tp != share.size:
        given = f"--tp {share.size}, but " if share.size > 1 else ""
        raise ConfigError(
            f"{given}{directory} holds shards for {layout.tp} ranks; give --tp {layout.tp}, or make others with statex "
            f"reshard --source {directory} --target NEW_DIR --to tp --tp N (or --to hf, for one process)"
        )
    return layout


def read_shard(
    directory: Path,
    config: ModelConfig,
    layout: TensorParallelLayout,
    share: TensorShare,
    *,
    dtype: torch.dtype | None,
    device: torch.device | str,
) -> dict[str, torch.Tensor]:
    """Read this rank's tensors; no other rank's file is opened.

    Args:
        directory: The directory of shards.
        config: The model's config.
        layout: What the directory says of its shards.
        share: This rank.
        dtype: Of the result; None takes that of the stored embedding table.
        device: Where the tensors go.

    Returns:
        Tensors by name; those that come in blocks have the rows of each part together.

    Raises:
        CheckpointError: The file is missing, damaged, renamed or another model's, or does not fit the config.
    """
    path = directory / layout.files[share.rank]
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; {LAYOUT_NAME} lists it")
    _check_manifest(directory, path, share)
    specs = _tensors_of(config)
    _check_layout(directory, config, layout, share, specs)
    names = family_of(config.MODEL_TYPE).names
    try:
        with safe_open(path, framework="pt") as file:
            check_place(path, file.metadata() or {}, rank=share.rank, tp=share.size)
            dtype = dtype or file.get_tensor(names.embeddings).dtype
            tensors = {}
            for name, spec in specs.items():
                tensor = file.get_tensor(name)
                if tuple(tensor.shape) != (wanted := _held_shape(spec, name, share)):
                    raise CheckpointError(
                        f"{path}: {name} has shape {tuple(tensor.shape)}; {LAYOUT_NAME} says {wanted}"
                    )
                if spec.blocks > 1 and share.size > 1:
                    tensor = tensor[rows_by_part(spec, share.size, share.rank)]
                # A copy: what is read is a map of the file, which somebody may replace while the model runs.
                tensors[name] = tensor.to(device=device, dtype=dtype, copy=True)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file of this model: {error}") from None
    return tensors


def check_replicas(
    directory: Path,
    config: ModelConfig,
    tensors: dict[str, torch.Tensor],
    layout: TensorParallelLayout,
    share: TensorShare,
) -> None:
    """Raise on every rank if what all of them hold whole differs, or their configs: their files are of several models.

    Raises:
        CheckpointError: It does; the first such tensor is named.
    """
    specs = _tensors_of(config)
    whole = [name for name, spec in specs.items() if _held_shape(spec, name, share) == spec.shape and spec.blocks == 1]
    mine = {name: _digest(tensors[name]) for name in whole}
    (first_config, first), *others = share.gather_objects((config.to_dict(), mine))
    for rank, (their_config, theirs) in enumerate(others, start=1):
        if keys := differing_keys(first_config, their_config):
            raise CheckpointError(
                f"{directory}: {CONFIG_NAME} of rank {rank} is another than that of rank 0: they differ in "
                f"{', '.join(keys[:3])}; copy it from one machine to the others"
            )
        if different := [name for name in whole if theirs.get(name) != first.get(name)]:
            raise CheckpointError(
                f"{directory}: {layout.files[0]} and {layout.files[rank]} are of different models: "
                f"{different[0]} is not the same in both"
            )


def _tensors_of(config: ModelConfig) -> dict[str, TensorSpec]:
    """Return the tensors that are read; a tied head is the embedding table."""
    family = family_of(config.MODEL_TYPE)
    specs = family.tensors(config)
    if config.tie_word_embeddings:
        specs.pop(family.names.head, None)
    return specs


def _held_shape(spec: TensorSpec, name: str, share: TensorShare) -> tuple[int, ...]:
    ranges = shard_ranges(spec, name, share.size, share.rank)
    held = sum(stop - start for start, stop in ranges)
    return tuple(held if axis == spec.axis else size for axis, size in enumerate(spec.shape))


def _check_layout(
    directory: Path,
    config: ModelConfig,
    layout: TensorParallelLayout,
    share: TensorShare,
    specs: dict[str, TensorSpec],
) -> None:
    """Raise unless the shards are cut as the model's table says: an older table, or another model's config."""
    again = f"make the shards again: statex reshard --to tp --tp {share.size}"
    names = {name for name in layout.tensors if not name.endswith(config.DERIVED)}
    if config.tie_word_embeddings:
        names.discard(family_of(config.MODEL_TYPE).names.head)
    for problem, found in (("lacks", specs.keys() - names), ("has unknown", names - specs.keys())):
        if found:
            raise CheckpointError(
                f"{directory / LAYOUT_NAME} {problem} tensors of the model in {CONFIG_NAME}: "
                f"{', '.join(sorted(found)[:3])} ({len(found)} in all); {again}"
            )
    for name, spec in specs.items():
        cut = layout.tensors[name]
        wanted = shard_ranges(spec, name, share.size, share.rank)
        if (cut.shape, cut.axis, tuple(cut.ranges[share.rank])) != (spec.shape, spec.axis, wanted):
            raise CheckpointError(
                f"{directory / LAYOUT_NAME}: rank {share.rank} holds {_text(cut.axis, cut.ranges[share.rank])} of "
                f"{name} {list(cut.shape)}; {CONFIG_NAME} asks for {_text(spec.axis, wanted)} of {list(spec.shape)}; "
                f"{again}"
            )


def _text(axis: int, ranges: object) -> str:
    return f"{'columns' if axis else 'rows'} {list(ranges)}"  # type: ignore[call-overload]


def _check_manifest(directory: Path, path: Path, share: TensorShare) -> None:
    """Raise unless the files that this rank reads are those that the directory was made with."""
    if not (directory / MANIFEST_NAME).is_file():
        if share.rank == 0:
            logger.warning(
                "%s holds no %s: whether the shards are of one model, and whole, can only be told from what all ranks "
                "hold",
                directory,
                MANIFEST_NAME,
            )
        return
    manifest = Manifest.read(directory)
    for file in (directory / CONFIG_NAME, directory / LAYOUT_NAME, path):
        record = manifest.files.get(file.name)
        if record is None:
            raise CheckpointError(f"{file} is not one of the files that {MANIFEST_NAME} lists; was it put there later?")
        record.check_size(file)
        if digest_file(file) != record.xxh3_128:
            raise CheckpointError(
                f"{file} is damaged, changed or of another model: its digest differs from {MANIFEST_NAME}"
            )


def _digest(tensor: torch.Tensor) -> str:
    return xxhash.xxh3_128(tensor.cpu().contiguous().view(torch.uint8).numpy().data).hexdigest()
