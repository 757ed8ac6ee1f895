"""torch's flight recorder: the last collectives of a rank, kept in memory and written where a job hangs.

``torchfrtrace -p collectives_rank RUN/stacks`` compares the files of all ranks.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import MutableMapping
from pathlib import Path

import torch.distributed as dist

PREFIX = "collectives_rank"
"""Beginning of the files' names; the rank follows."""

ENTRIES = 2000
"""Collectives that are kept, unless the user says otherwise."""

_SIZES = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")
_FILES = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")


def enable(directory: Path, environment: MutableMapping[str, str] | None = None) -> None:
    """Have the collectives of process groups that are made later recorded; what the user has set stays.

    NCCL's own watchdog writes its record to ``directory`` too, where a collective passes its time limit.

    Args:
        directory: Where files go; it is not made here.
        environment: The variables to set; by default those of this process.
    """
    variables = os.environ if environment is None else environment
    if not any(name in variables for name in _SIZES):
        variables[_SIZES[0]] = str(ENTRIES)
    if not any(name in variables for name in _FILES):
        variables[_FILES[0]] = str(directory.absolute() / PREFIX)
    variables.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")


def dump(directory: Path, rank: int) -> Path | None:
    """Write what this rank recorded, as pickle in torch's form, and return the file; None where nothing was recorded.

    Args:
        directory: Where it goes.
        rank: This process among all.

    Raises:
        OSError: It cannot be written.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None
    from torch._C import _distributed_c10d

    # NCCL has a recorder of its own; the general one has the collectives of gloo.
    nccl = dist.get_backend() == "nccl"
    write = getattr(_distributed_c10d, "_dump_nccl_trace" if nccl else "_dump_fr_trace", None)
    if write is None:
        return None
    data: bytes = write()
    path = directory / f"{PREFIX}{rank}"
    path.write_bytes(data if nccl else _with_groups(data))
    return path


def _with_groups(data: bytes) -> bytes:
    """Return a record of gloo's with its process groups by name: torch 2.13 writes them without, for torchfrtrace."""
    record = pickle.loads(data)  # of this process
    names = dist.distributed_c10d._world.pg_names
    record["pg_config"] = {
        name: {"name": name, "desc": group.group_desc, "ranks": str(dist.get_process_group_ranks(group))}
        for group, name in names.items()
    }
    return pickle.dumps(record)
