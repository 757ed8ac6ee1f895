"""A rank's part of a checkpoint: its own file of tensor-parallel shards, or its rows and columns of whole tensors.

A shard of another model has the same names and shapes, and nothing fails when it is run. So a file must be the one that
the directory's manifest describes, what each rank holds must be what the model's config asks for, and what all ranks
hold must be the same on all of them.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
import xxhash

from statex_dist.checkpoint.formats.piece_io import WholeReader
from statex_dist.checkpoint.formats.places import missing_text
from statex_dist.checkpoint.formats.tensor_parallel import LAYOUT_NAME, RankSource, TensorParallelLayout
from statex_dist.checkpoint.json_file import differing_keys
from statex_dist.checkpoint.layout import MANIFEST_NAME
from statex_dist.checkpoint.manifest import Manifest, digest_file
from statex_dist.errors import CheckpointError
from statex_dist.models.config import CONFIG_NAME, ModelConfig
from statex_dist.models.hf import open_runnable, read_tensor, torch_dtype
from statex_dist.models.layout import TensorSpec, rows_by_part, shard_ranges
from statex_dist.models.model_check import check_tensor
from statex_dist.models.registry import family_of
from statex_dist.models.tensor_parallel.share import TensorShare

logger = logging.getLogger(__name__)


def read_layout(directory: Path, share: TensorShare) -> TensorParallelLayout | None:
    """Return what a directory says of its shards; None where it holds none for this number of ranks.

    Raises:
        CheckpointError: What it says cannot be.
    """
    path = directory / LAYOUT_NAME
    if not path.is_file():
        return None
    layout = TensorParallelLayout.read(path)
    return layout if layout.tp == share.size else None


def read_part(
    directory: Path,
    share: TensorShare,
    *,
    dtype: torch.dtype | None,
    device: torch.device | str,
    digests: bool = True,
) -> dict[str, torch.Tensor]:
    """Read this rank's part of the tensors of a checkpoint that holds them whole, or cut for other ranks.

    Each rank reads every tensor, one at a time, and keeps its rows or columns.

    Args:
        directory: Whatever :func:`statex_dist.models.source.open_model` opens.
        share: This rank.
        dtype: Of the result; None takes that of the stored embedding table.
        device: Where the tensors go.
        digests: Whether contents are compared with digests and checksums.

    Returns:
        Tensors by name; those that come in blocks have the rows of each part together.

    Raises:
        CheckpointError: The checkpoint is incomplete, damaged or of another architecture.
        ConfigError: This number of ranks cannot share the model.
    """
    opened = open_runnable(directory, digests=digests)
    source, specs = opened.source, _tensors_of(opened.config)
    dtype = dtype or torch_dtype(source.info(family_of(opened.config.MODEL_TYPE).names.embeddings).dtype)
    tensors = {}
    with WholeReader(source, crcs=digests) as reader:
        for name, spec in specs.items():
            whole = read_tensor(reader, source, name)
            ranges = shard_ranges(spec, name, share.size, share.rank)
            held = torch.cat([whole.narrow(spec.axis, a, b - a) for a, b in ranges], spec.axis) if spec.shape else whole
            tensors[name] = _placed(held, spec, share, dtype=dtype, device=device)
    return tensors


def read_shard(
    directory: Path,
    config: ModelConfig,
    layout: TensorParallelLayout,
    share: TensorShare,
    *,
    dtype: torch.dtype | None,
    device: torch.device | str,
    digests: bool = True,
) -> dict[str, torch.Tensor]:
    """Read this rank's tensors; no other rank's file is opened.

    Args:
        directory: The directory of shards.
        config: The model's config.
        layout: What the directory says of its shards.
        share: This rank.
        dtype: Of the result; None takes that of the stored embedding table.
        device: Where the tensors go.
        digests: Whether the files are compared with the manifest's digests; sizes always are.

    Returns:
        Tensors by name; those that come in blocks have the rows of each part together.

    Raises:
        CheckpointError: The file is missing, damaged, renamed or another model's, or does not fit the config.
    """
    path = directory / layout.files[share.rank]
    if not path.is_file():
        raise CheckpointError(missing_text(path, LAYOUT_NAME))
    _check_manifest(directory, path, share, digests=digests)
    source = RankSource(path, rank=share.rank, tp=share.size)
    specs = _tensors_of(config)
    _check_layout(directory, config, layout, share, specs)
    tensors = {}
    for name, spec in specs.items():
        if name not in source:
            raise CheckpointError(f"{path} lacks tensor '{name}' of this model, which {LAYOUT_NAME} lists")
        check_tensor(source.info(name), _held_shape(spec, name, share), path, LAYOUT_NAME)
    dtype = dtype or torch_dtype(source.info(family_of(config.MODEL_TYPE).names.embeddings).dtype)
    with WholeReader(source) as reader:
        for name, spec in specs.items():
            tensors[name] = _placed(read_tensor(reader, source, name), spec, share, dtype=dtype, device=device)
    return tensors


def _placed(
    held: torch.Tensor, spec: TensorSpec, share: TensorShare, *, dtype: torch.dtype, device: torch.device | str
) -> torch.Tensor:
    """Return what a rank holds of a tensor as its modules want it."""
    if spec.blocks > 1 and share.size > 1:
        held = held[rows_by_part(spec, share.size, share.rank)]
    return held.contiguous().to(device=device, dtype=dtype)


def check_replicas(
    directory: Path,
    config: ModelConfig,
    tensors: dict[str, torch.Tensor],
    layout: TensorParallelLayout | None,
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
                f"{directory}: {_files_of(layout, 0)} and {_files_of(layout, rank)} are of different models: "
                f"{different[0]} is not the same in both"
            )


def _files_of(layout: TensorParallelLayout | None, rank: int) -> str:
    return layout.files[rank] if layout is not None else f"the files of rank {rank}"


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


def _check_manifest(directory: Path, path: Path, share: TensorShare, *, digests: bool) -> None:
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
        if digests and digest_file(file) != record.xxh3_128:
            raise CheckpointError(
                f"{file} is damaged, changed or of another model: its digest differs from {MANIFEST_NAME}"
            )


def _digest(tensor: torch.Tensor) -> str:
    return xxhash.xxh3_128(tensor.cpu().contiguous().view(torch.uint8).numpy().data).hexdigest()
