"""Blocks of tensors to their places in the files of a target, small neighbours together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path

import numpy as np

from checkpoints_tools.io.target_file import OpenFile
from statex_dist.checkpoint.formats.piece_io import window_of
from statex_dist.checkpoint.formats.tensor_io import Piece


class GatheredWrites:
    """Writes that are put off for a while, so that neighbours in a file are written together.

    Args:
        files: The files, by name.
    """

    def __init__(self, files: Mapping[str, OpenFile]):
        self._files = files
        self._writes: dict[Path, list[tuple[int, bytes]]] = {}

    def write(self, path: Path, offset: int, data: memoryview) -> None:
        """Write bytes into a file: now, or, of few, at the next :meth:`flush`."""
        if len(data) > _MOST_PUT_OFF:
            self._files[str(path)].write(offset, data)
        elif (writes := self._writes.get(path)) is not None:
            writes.append((offset, bytes(data)))
        else:
            self._writes[path] = [(offset, bytes(data))]

    def flush(self) -> None:
        """Write what was put off."""
        for path, writes in self._writes.items():
            file = self._files[str(path)]
            writes.sort(key=itemgetter(0))
            run: list[bytes] = []
            start = position = writes[0][0]
            for offset, data in writes:
                if offset != position:
                    file.write(start, memoryview(b"".join(run)))
                    start, run = offset, []
                run.append(data)
                position = offset + len(data)
            file.write(start, memoryview(b"".join(run)))
        self._writes.clear()


_MOST_PUT_OFF = 1 << 16


def write_block(gathered: GatheredWrites, places: Sequence[Piece], item: int, start: int, block: np.ndarray) -> None:
    """Write elements ``start`` and on of a tensor, each of ``item`` bytes, to wherever they belong."""
    stop, view = start + len(block) // item, block.data
    for place in places:
        if place.width == 1:
            first, last = max(place.start, start), min(place.stop, stop)
            if first < last:
                data = view[(first - start) * item : (last - start) * item]
                gathered.write(place.path, place.offset + (first - place.start) * item, data)
        elif place.start * place.width < stop and start < place.stop * place.width:
            part, offset = window_of(place, start, block, item)
            gathered.write(place.path, offset, np.ascontiguousarray(part).reshape(-1).data)
