"""The partitions of ZeRO stages 1 and 2 cut again, for a run that resumes on another number of ranks.

A flat group is its parameters one after the other with zeros behind them, and each rank has an equal part of it
(:mod:`statex_dist.checkpoint.formats.zero_whole.reader`). Files are mapped, so that a rank reads its own part alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch

from statex_dist.checkpoint.formats.zero_whole.files import optim_files


def recut(
    directory: Path, lengths: Sequence[int], sizes: Sequence[int], *, rank: int, world_size: int
) -> dict[str, Any]:
    """Return the contents of a rank's optimizer file as the present number of ranks would have written it.

    Args:
        directory: The checkpoint, whose files hold no foreign code.
        lengths: Elements of the parameters of each group.
        sizes: Elements of a rank's partition of each group now, padding included.
        rank: The rank.
        world_size: Number of ranks now.
    """
    # Foreign code was refused by the caller.
    files = [torch.load(path, map_location="cpu", mmap=True, weights_only=False) for path in optim_files(directory)]
    saved = [file["optimizer_state_dict"] for file in files]
    first: dict[str, Any] = saved[0]
    weights: list[torch.Tensor] = []
    states: dict[int, dict[str, Any]] = {}
    paddings: list[int] = []
    for group, (length, size) in enumerate(zip(lengths, sizes, strict=True)):
        parts = [rank_states["single_partition_of_fp32_groups"][group] for rank_states in saved]
        ends = [0, *accumulate(len(part) for part in parts)]
        start, stop = min(rank * size, length), min((rank + 1) * size, length)
        weights.append(_cut(parts, ends, range(start, stop), size))
        paddings.append(size - (stop - start))
        states[group] = {
            name: _cut([_states(s, group)[name] for s in saved], ends, range(start, stop), size)
            if isinstance(value, torch.Tensor) and value.dim()
            else value
            for name, value in _states(first, group).items()
        }
    base = {**first["base_optimizer_state"], "state": {group: held for group, held in states.items() if held}}
    made = {
        **first,
        "single_partition_of_fp32_groups": weights,
        "base_optimizer_state": base,
        "group_paddings": paddings,
        "partition_count": [world_size] * len(sizes),
    }
    return {**files[0], "optimizer_state_dict": made}


def _states(saved: dict[str, Any], group: int) -> dict[str, Any]:
    """Return what a rank's optimizer keeps of a group; nothing before the first step."""
    return saved["base_optimizer_state"]["state"].get(group, {})


def _cut(parts: Sequence[torch.Tensor], ends: Sequence[int], wanted: range, size: int) -> torch.Tensor:
    """Return the wanted elements of a flat group out of the ranks' partitions, with zeros up to ``size``."""
    result = torch.zeros(size, dtype=parts[0].dtype)
    for part, (begin, end) in zip(parts, pairwise(ends), strict=True):
        low, high = max(begin, wanted.start), min(end, wanted.stop)
        if low < high:
            result[low - wanted.start : high - wanted.start] = part[low - begin : high - begin]
    return result
