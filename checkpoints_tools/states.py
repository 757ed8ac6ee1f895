"""What a file of states says of itself (``statex generate --save-state``; statex_dist/inference/cache.py writes it)."""

from __future__ import annotations

from pathlib import Path

from statex_dist.checkpoint.formats.safetensors_io import read_header
from statex_dist.checkpoint.layout import STATES_FORMAT
from statex_dist.errors import CheckpointError


def read_states_header(path: Path) -> dict[str, str]:
    """Return whose states a file holds and how many tokens were read, from its header alone.

    Raises:
        CheckpointError: It is another file, or damaged.
    """
    try:
        tensors, header = read_header(path)
    except CheckpointError:
        header = {}
    if header.get("format") != STATES_FORMAT:
        raise CheckpointError(f"{path} is a file, and no file of states; give the directory that holds the checkpoint")
    size = sum(info.nbytes for info, _ in tensors.values())
    return {**{key: value for key, value in header.items() if key != "digest"}, "bytes": str(size)}
