"""A model laid out without memory, and the values of its parameters, read or drawn a range at a time.

An engine that partitions a model (ZeRO-3) asks each rank for its own elements only, so that no process ever holds the
whole model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from statex_dist.checkpoint.formats.piece_io import PieceReader, SourceCrcs, WholeReader
from statex_dist.checkpoint.formats.raw_io import BLOCK_BYTES
from statex_dist.checkpoint.formats.tensor_io import Piece
from statex_dist.models.build import build_lm
from statex_dist.models.config import ModelConfig
from statex_dist.models.hf import open_runnable, parts_in, torch_dtype
from statex_dist.models.lm import RecurrentLM
from statex_dist.models.row_mapping import Distribution, generator_for

_DRAWN_AT_ONCE = 1 << 20


def outline(config: ModelConfig, dtype: torch.dtype) -> RecurrentLM:
    """Return a model whose parameters are on ``meta`` and whose buffers, where it has any, are on the CPU.

    Args:
        config: The model's configuration.
        dtype: Of its parameters.

    Raises:
        ConfigError: The model cannot be run here.
    """
    with torch.device("meta"):
        model = build_lm(config)
    model.make_buffers()
    model.finish_build(dtype)
    return model


class StoredValues:
    """The tensors of a checkpoint of any layout.

    Args:
        directory: As for :func:`statex_dist.models.hf.from_pretrained`.
        dtype: Of the model's parameters.
        digests: Whether :meth:`verify` compares the files with digests and checksums.

    Attributes:
        model: The checkpoint's model as :func:`outline` returns it.

    Raises:
        CheckpointError: The directory is incomplete or of another architecture.
        ConfigError: The model has layers that only other software runs.
    """

    def __init__(self, directory: Path, *, dtype: torch.dtype, digests: bool = True):
        opened = open_runnable(directory, digests=digests)
        self._source = opened.source
        self.model = outline(opened.config, dtype)
        shapes = {name: tuple(tensor.shape) for name, tensor in self.model.stored_tensors().items()}
        parts = self.model.file_parts()
        self._parts = {name: parts_in(self._source, name, parts[name], shape) for name, shape in shapes.items()}
        archives = list(self._source.archives()) if digests else []
        self._crcs = SourceCrcs(archives) if archives else None
        self._digests = digests
        self._reader = PieceReader(self._source.opened, self._crcs, self._source.ahead)

    def read(self, name: str, start: int, stop: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield the elements ``start .. stop`` of a flattened tensor as ``(first element, values)``, in order.

        Args:
            name: Name in the model's memory.
            start: First element.
            stop: Element after the last.

        Raises:
            CheckpointError: The files cannot be read, or replicas differ.
        """
        begin = 0
        for part in self._parts[name]:
            size = math.prod(part.shape)
            first, last = max(start - begin, 0), min(stop - begin, size)
            if first < last:
                for place, values in self._read_part(part.name, first, last):
                    yield begin + place, values
            begin += size

    def _read_part(self, name: str, start: int, stop: int) -> Iterator[tuple[int, torch.Tensor]]:
        source = self._source
        info, pieces, replicas = source.info(name), source.pieces(name), source.replicas(name)
        # Where a piece is of some columns (tensor parallelism), only whole rows can be read.
        width = max((p.width for p in (*pieces, *replicas) if isinstance(p, Piece)), default=1)
        step = max(BLOCK_BYTES // (width * info.item_bytes), 1) * width
        for first in range(start // width * width, stop, step):
            last = min(first + step, -(-stop // width) * width)
            block = np.empty((last - first) * info.item_bytes, dtype=np.uint8)
            self._reader.read(pieces, info, first, block, replicas)
            values = torch.from_numpy(block).view(torch_dtype(info.dtype))
            yield max(first, start), values[max(start - first, 0) : stop - first]

    def verify(self, rank: int, world_size: int) -> None:
        """Compare this rank's share of the files with the manifest's digests and the archives' checksums.

        Ranges cannot be compared with the digest of a tensor, so every rank reads some whole tensors, a block at a
        time: together the ranks read the checkpoint once more.

        Args:
            rank: This process.
            world_size: Processes that share the work.

        Raises:
            CheckpointError: A tensor or an archive is damaged.
        """
        if not self._digests:
            return
        digests = self._source.facts.digests
        names = sorted({part.name for parts in self._parts.values() for part in parts if part.name in digests})
        with WholeReader(self._source, crcs=False) as reader:
            for name in names[rank::world_size]:
                for _ in reader.blocks(name):
                    pass  # the digest is compared behind the last block
        if self._crcs is not None:
            for part in (part for parts in self._parts.values() for part in parts):
                self._crcs.expect(self._source.pieces(part.name))
            self._crcs.finish(rank=rank, world_size=world_size)

    def close(self) -> None:
        """Close the files."""
        self._reader.close()


class DrawnValues:
    """First values of a new model, the same as :meth:`RecurrentLM.init_parameters` gives.

    Args:
        config: The model's configuration.
        dtype: Of its parameters.
        seed: Of the values.

    Attributes:
        model: The model as :func:`outline` returns it.

    Raises:
        ConfigError: The model cannot be run here, or only transformers makes its first values.
    """

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, seed: int):
        self.model = outline(config, dtype)
        self.model.check_drawable()
        shapes = {name: tuple(parameter.shape) for name, parameter in self.model.named_parameters()}
        self._first: dict[str, Distribution] = {
            name: self.model.first_value(name, shape) for name, shape in shapes.items()
        }
        self._seed = seed

    def read(self, name: str, start: int, stop: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield the elements ``start .. stop`` of a flattened parameter as ``(first element, values)``, in order.

        What lies before ``start`` is drawn and dropped: a normal value takes a varying number of draws, so that the
        generator cannot be set to a place. The last rank of a large job draws nearly the whole model.

        Args:
            name: Name of the parameter.
            start: First element.
            stop: Element after the last.
        """
        first, generator = self._first[name], generator_for(self._seed, name)
        place = 0
        while place < stop:
            border = start if place < start else stop
            count = min(_DRAWN_AT_ONCE, border - place)
            values = first.draw(generator, place, count)
            if place >= start:
                yield place, torch.from_numpy(values)
            place += count

    def verify(self, rank: int, world_size: int) -> None:
        """Compare nothing: drawn values are in no file."""

    def close(self) -> None:
        """Close nothing."""


ModelValues = StoredValues | DrawnValues
