"""Memory of a row: its state has one size, keys and values of a hybrid's attention grow with every token."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from statex_dist.errors import ConfigError
from statex_dist.inference.prefill import device_of, evaluating, prefill
from statex_dist.inference.rows import key_value_bytes, state_bytes
from statex_dist.models.lm import RecurrentLM

_MEMORY_FILE = Path("/proc/meminfo")


@dataclass(frozen=True, kw_only=True, slots=True)
class RowMemory:
    """Memory of a row.

    Attributes:
        state: Bytes of its recurrent states, whatever it has read.
        per_token: Bytes of keys and values for each token; 0 without attention.
    """

    state: int
    per_token: int


def has_attention(model: RecurrentLM) -> bool:
    """Return whether a model keeps keys and values."""
    return any(kind == "attention" for _, kind in model.state_places)


def measure_row(model: RecurrentLM) -> RowMemory:
    """Return the memory of a row, measured with one token; kernels are compiled on the way."""
    with evaluating(model):
        _, states = prefill(model, torch.zeros(1, 1, dtype=torch.int64, device=device_of(model)))
    grows = key_value_bytes(states)
    return RowMemory(state=state_bytes(states) - grows, per_token=grows)


def free_bytes(device: torch.device) -> int | None:
    """Return the bytes that are free on a device, or None where the system does not tell it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if not _MEMORY_FILE.is_file():
        return None
    lines = dict(line.split(":", 1) for line in _MEMORY_FILE.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def key_value_budget(model: RecurrentLM) -> int | None:
    """Return the bytes that keys and values may take: half of the free ones, as rows that join or leave are copied.

    None without attention, or where the system does not tell the free memory.
    """
    free = free_bytes(device_of(model)) if has_attention(model) else None
    return None if free is None else free // 2


def rows_with_memory(model: RecurrentLM, tokens_per_row: int, wanted: int) -> int:
    """Return the batch size, at most ``wanted``, whose keys and values fit into the memory that is free.

    Raises:
        ConfigError: Not one row's do.
    """
    budget = key_value_budget(model)
    if budget is None:
        return wanted
    needed = tokens_per_row * measure_row(model).per_token
    if needed > budget:
        raise ConfigError(
            f"keys and values of {tokens_per_row} tokens take {needed} bytes, {budget} may be used (half of the free "
            "memory); give a shorter prompt or fewer new tokens"
        )
    return min(wanted, budget // needed)
