"""Reading whole tensors block by block, compared with the manifest's digests and the checksums of archives."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType

import numpy as np
import xxhash

from statex_dist.checkpoint.formats.piece_io import PieceReader, SourceCrcs
from statex_dist.checkpoint.formats.raw_io import BLOCK_BYTES
from statex_dist.checkpoint.formats.tensor_io import Piece, TensorSource
from statex_dist.checkpoint.layout import MANIFEST_NAME
from statex_dist.errors import CheckpointError


class WholeReader:
    """Reads tensors of a source, one after the other; a context manager, which checks what is left at its end.

    Args:
        source: The checkpoint; its facts hold the digests that count.
        crcs: Whether archives are compared with their CRC-32.
    """

    def __init__(self, source: TensorSource, *, crcs: bool = True):
        archives = list(source.archives()) if crcs else []
        self._source, self._crcs = source, SourceCrcs(archives) if archives else None
        self._reader = PieceReader(source.opened, self._crcs, source.ahead)
        self._buffer = np.empty(0, dtype=np.uint8)

    def blocks(self, name: str, out: np.ndarray | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """Yield ``(first element, bytes)`` of the blocks of a flattened tensor, in order.

        Args:
            name: The tensor.
            out: ``[nbytes]`` uint8 in which the blocks are then parts; None reads each into one buffer.

        Raises:
            CheckpointError: The files cannot be read, replicas differ, or the tensor is not that of the manifest.
        """
        info, pieces, replicas = self._source.info(name), self._source.pieces(name), self._source.replicas(name)
        expected = self._source.facts.digests.get(name)
        digest = xxhash.xxh3_128()
        # Where a piece is of some columns, blocks are whole rows.
        width = max((p.width for p in (*pieces, *replicas) if isinstance(p, Piece)), default=1)
        step = max(BLOCK_BYTES // (width * info.item_bytes), 1) * width
        for first in range(0, info.numel, step):
            size = min(step, info.numel - first) * info.item_bytes
            block = self._room(size) if out is None else out[first * info.item_bytes :][:size]
            self._reader.read(pieces, info, first, block)
            for replica in replicas:
                if self._reader.differing(replica, info, first, block):
                    raise CheckpointError(
                        f"tensor '{name}': the copy of it in {replica.path} differs from the other ranks' copies"
                    )
            if expected is not None:
                digest.update(block.data)
            yield first, block
        if expected is not None and digest.hexdigest() != expected:
            raise CheckpointError(
                f"{self._source.facts.path} is damaged: the values of tensor '{name}' are not those of its "
                f"{MANIFEST_NAME}"
            )

    def _room(self, size: int) -> np.ndarray:
        if len(self._buffer) < size:
            self._buffer = np.empty(size, dtype=np.uint8)
        return self._buffer[:size]

    def __enter__(self) -> WholeReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._reader.close()
        if kind is None and self._crcs is not None:
            self._crcs.finish()
