"""The values of one output tensor as a stream of blocks: bytes copied from a source, new rows drawn, dtypes converted.

Both the writer and the verifier consume this stream, so what is proved of a checkpoint is what was meant to be written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import xxhash

from checkpoints_tools.convert import cast, encode, has_nonfinite
from checkpoints_tools.raw_io import BLOCK_BYTES
from checkpoints_tools.tensor_io import TensorInfo, TensorSource
from statex_dist.errors import CheckpointError
from statex_dist.models.recipe import Keep
from statex_dist.models.surgery import Surgery


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorJob:
    """One tensor of a target.

    Attributes:
        info: As it is to be stored.
        source: As the source holds it; None for a tensor that the source has not.
        surgery: What becomes of its rows; None where all values are kept.
    """

    info: TensorInfo
    source: TensorInfo | None
    surgery: Surgery | None = None


class TensorStream:
    """Produces the bytes of jobs, one after the other, in buffers of its own (one stream per thread).

    Args:
        source: Where kept values come from.
        allow_nonfinite: Whether NaN and Inf may be copied; else they are an error.
    """

    def __init__(self, source: TensorSource, *, allow_nonfinite: bool):
        self._source, self._allow_nonfinite = source, allow_nonfinite
        self._buffer = np.empty(BLOCK_BYTES, dtype=np.uint8)
        self._scratch = np.empty(BLOCK_BYTES, dtype=np.uint8)
        self._digest = xxhash.xxh3_128()

    def blocks(self, job: TensorJob) -> Iterator[np.ndarray]:
        """Yield a tensor's bytes in the stored dtype, in order; a block is valid until the next one is asked for.

        Raises:
            CheckpointError: The source cannot be read or has changed, a value is not finite, or a dtype cannot be
                converted.
        """
        self._digest = xxhash.xxh3_128()
        if job.surgery is None:
            assert job.source is not None
            yield from self._copied(job, 0, job.source.nbytes)
            return
        recipe = job.surgery.recipe
        for index, block in enumerate(recipe.blocks):
            if isinstance(block, Keep):
                assert job.source is not None
                row_bytes = recipe.row_numel * job.source.item_bytes
                yield from self._copied(job, block.start * row_bytes, block.stop * row_bytes)
            else:
                # New values are rounded to the source's dtype first, so that --dtype rounds what it would have kept.
                dtype = job.source.dtype if job.source is not None else job.info.dtype
                for values in job.surgery.draw(index, size=BLOCK_BYTES // 4):
                    made = cast(encode(values, dtype), dtype, job.info.dtype)
                    self._check(made, job.info.dtype, job, "among its new rows")
                    yield made

    def source_digest(self) -> str:
        """Return the xxh3-128 digest of the source bytes of the last job, where all of them were copied in order."""
        return self._digest.hexdigest()

    def _copied(self, job: TensorJob, start: int, stop: int) -> Iterator[np.ndarray]:
        assert job.source is not None
        for position in range(start, stop, BLOCK_BYTES):
            block = self._buffer[: min(BLOCK_BYTES, stop - position)]
            self._source.read_into(job.source.name, position, block.data)
            self._digest.update(block.data)
            self._check(block, job.source.dtype, job, "in the source")
            if job.info.dtype != job.source.dtype:
                try:
                    block = cast(block, job.source.dtype, job.info.dtype)
                except CheckpointError as error:
                    raise CheckpointError(f"tensor '{job.info.name}': {error}") from None
                self._check(block, job.info.dtype, job, f"once it is stored as {job.info.dtype}")
            yield block

    def _check(self, block: np.ndarray, dtype: str, job: TensorJob, where: str) -> None:
        if not self._allow_nonfinite and has_nonfinite(block, dtype, self._scratch):
            raise CheckpointError(
                f"tensor '{job.info.name}' holds NaN or Inf {where} ({self._source.facts.path}); "
                "pass --allow-nonfinite to copy it all the same"
            )
