"""``tp_layout.json``: which rows or columns of every tensor each tensor-parallel rank's file holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from statex_dist.checkpoint.json_file import read_json
from statex_dist.errors import CheckpointError, reason, shown

LAYOUT_NAME = "tp_layout.json"
LAYOUT_VERSION = 1
_MAX_LAYOUT_BYTES = 100_000_000

Ranges = Sequence[tuple[int, int]]


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorCut:
    """How ranks share one tensor.

    Attributes:
        shape: Its full shape.
        axis: 0 where they hold rows, 1 for columns.
        ranges: For each rank the ranges ``(start, stop)`` along the axis, in the order in which its file has them.
    """

    shape: tuple[int, ...]
    axis: int
    ranges: list[Ranges]


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorParallelLayout:
    """The contents of the file.

    Attributes:
        tp: Number of ranks.
        files: Each rank's file.
        tensors: Every tensor by name.
    """

    tp: int
    files: list[str]
    tensors: dict[str, TensorCut]

    @classmethod
    def read(cls, path: Path) -> TensorParallelLayout:
        """Read the file.

        Raises:
            CheckpointError: It is unreadable or says what cannot be.
        """
        try:
            if path.stat().st_size > _MAX_LAYOUT_BYTES:
                raise ValueError(f"it is larger than {_MAX_LAYOUT_BYTES} bytes")
            content = read_json(path)
            if content["version"] != LAYOUT_VERSION:
                raise ValueError(f"version {shown(content['version'])}; only {LAYOUT_VERSION} is known")
            tp, files = content["tp"], [str(name) for name in content["files"]]
            if type(tp) is not int or tp != len(files) or files != [file_name(rank, tp) for rank in range(len(files))]:
                raise ValueError(f"its files are not those of {tp} ranks")
            tensors = {
                str(name): TensorCut(
                    shape=tuple(int(size) for size in entry["shape"]),
                    axis=int(entry["axis"]),
                    ranges=[[(int(start), int(stop)) for start, stop in ranges] for ranges in entry["ranges"]],
                )
                for name, entry in content["tensors"].items()
            }
            for name, cut in tensors.items():
                if not _possible(cut, tp):
                    raise ValueError(f"the ranges of tensor '{name}' are not those of {tp} ranks")
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            IndexError,
            AttributeError,
            OverflowError,
            RecursionError,
        ) as error:
            raise CheckpointError(f"{path} cannot be read: {reason(error)}") from None
        return cls(tp=tp, files=files, tensors=tensors)


def file_name(rank: int, tp: int) -> str:
    """Return the name of a rank's file."""
    return f"model-tp-{rank:02d}-of-{tp:02d}.safetensors"


def check_place(path: Path, metadata: dict[str, str], *, rank: int, tp: int) -> None:
    """Raise if a rank's file says in its header that it is another's.

    Raises:
        CheckpointError: It does.
    """
    said = metadata.get("tp_rank", str(rank)), metadata.get("tp_size", str(tp))
    if said != (str(rank), str(tp)):
        raise CheckpointError(f"{path} says that it is rank {said[0]} of {said[1]}: it was renamed")


def _possible(cut: TensorCut, tp: int) -> bool:
    """Return whether ranges can be those of a tensor on ``tp`` ranks."""
    shape, axis = cut.shape, cut.axis
    if len(cut.ranges) != tp or min(shape, default=0) < 0 or axis not in range(min(max(len(shape), 1), 2)):
        return False
    size = shape[axis] if shape else 0
    inside = all(0 <= start <= stop <= size for of_rank in cut.ranges for start, stop in of_rank)
    return inside and (axis == 0 or all(len(of_rank) == 1 for of_rank in cut.ranges))
