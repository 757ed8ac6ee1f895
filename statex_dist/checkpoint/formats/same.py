"""Whether the same weights lie in a directory twice, or two names hold the same values."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from statex_dist.checkpoint.formats.piece_io import PieceReader
from statex_dist.checkpoint.formats.raw_io import BLOCK_BYTES
from statex_dist.checkpoint.formats.registry import Open, layouts
from statex_dist.checkpoint.formats.tensor_io import Piece, TensorSource
from statex_dist.errors import CheckpointError


def ways_to_read(directory: Path) -> dict[str, tuple[str, Open]]:
    """Return the files by which a model directory can be read, the one that is taken first, with layout and opener.

    An index comes before a single file, safetensors before ``.bin``. A file that its index lists is no other way.
    """
    on_hub = [layout for layout in layouts() if layout.is_hub]
    return {name: (layout.name, opener) for layout in on_hub for name, opener in layout.ways(directory).items()}


def check_ways(first: TensorSource, directory: Path) -> None:
    """Raise if a model directory holds further weights that are not those that are read.

    Raises:
        CheckpointError: It does; both files are named.
    """
    taken, *others = ways_to_read(directory)
    for name in others:
        end = f"keep the one that is the model, and move the other away from {directory}"
        try:
            other = ways_to_read(directory)[name][1](None)
        except CheckpointError as error:
            raise CheckpointError(
                f"{directory} holds {taken} and also {name}, which cannot be read: {str(error)[:160]}"
            ) from None
        if difference := _difference(first, other):
            raise CheckpointError(f"{taken} and {name} hold different weights: {difference}; {end}")


def _difference(first: TensorSource, second: TensorSource) -> str | None:
    """Return how the tensors of two sources differ, or None; a tied tensor may have one name in one of them."""
    for one, other in ((first, second), (second, first)):
        for name in one.owned():
            group = [name, *(alias for alias, owner in one.aliases.items() if owner == name)]
            if not any(member in other for member in group):
                return f"'{name}' is in one of them alone"
    for name in first.keys():  # noqa: SIM118 - not a mapping
        if name not in second:
            continue
        a, b = first.info(name), second.info(name)
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            return f"'{name}' is {a.dtype} {list(a.shape)} in one, {b.dtype} {list(b.shape)} in the other"
        if not same_values(first, name, second, name):
            return f"the values of '{name}' differ"
    return None


def same_values(first: TensorSource, first_name: str, second: TensorSource, second_name: str) -> bool:
    """Return whether two tensors have the same shape, dtype and bytes; tied names are not read."""
    if first is second and first.aliases.get(first_name, first_name) == second.aliases.get(second_name, second_name):
        return True
    a, b = first.info(first_name), second.info(second_name)
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    readers = [PieceReader(source.opened, ahead=source.ahead) for source in (first, second)]
    pieces = [first.pieces(first_name), second.pieces(second_name)]
    width = max([piece.width for of_one in pieces for piece in of_one if isinstance(piece, Piece)], default=1)
    step = max(BLOCK_BYTES // (width * a.item_bytes), 1) * width
    try:
        for start in range(0, a.numel, step):
            one, other = (np.empty(min(step, a.numel - start) * a.item_bytes, dtype=np.uint8) for _ in range(2))
            readers[0].read(pieces[0], a, start, one)
            readers[1].read(pieces[1], b, start, other)
            if not np.array_equal(one, other):
                return False
        return True
    finally:
        for reader in readers:
            reader.close()
