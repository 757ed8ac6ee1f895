"""Memory of one sequence while a model reads or writes it: states, which stay as they are, and keys and values, which
grow with each token.

Matrix states are fp32 in every model. Tails of convolutions, keys and values have the model's dtype. Where a layer has
an attention and a recurrence, both are counted; a block that several layers use keeps keys and values for each use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from statex_dist.checkpoint.dtypes import ITEM_BYTES, TORCH_NAMES
from statex_dist.errors import ConfigError
from statex_dist.models.config import LARGEST_SIZE, ModelConfig
from statex_dist.state.geometry import STATE_BYTES

DEFAULT_TOKENS = 65536
"""Length of a sequence where neither the user nor the model says one."""

_DTYPES = {name: dtype for dtype, name in TORCH_NAMES.items() if dtype in ("F64", "F32", "F16", "BF16")}


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceMemory:
    """Bytes that one sequence takes.

    Attributes:
        dtype: Of tails, keys and values.
        state_bytes: Of the recurrent layers, whatever the length.
        kv_bytes_per_token: Of the attention layers; None where their sizes are not known.
        tokens: Length of the sequence.
    """

    dtype: str
    state_bytes: int
    kv_bytes_per_token: int | None
    tokens: int

    @property
    def kv_bytes(self) -> int | None:
        """Bytes of keys and values of the whole sequence."""
        return None if self.kv_bytes_per_token is None else self.kv_bytes_per_token * self.tokens

    def to_dict(self) -> dict[str, Any]:
        """Return plain containers for JSON."""
        return {
            "dtype": self.dtype,
            "state_bytes": self.state_bytes,
            "kv_bytes_per_token": self.kv_bytes_per_token,
            "tokens": self.tokens,
            "kv_bytes": self.kv_bytes,
        }


def sequence_memory(config: ModelConfig, *, tokens: int | None = None, dtype: str | None = None) -> SequenceMemory:
    """Return what one sequence of a model takes.

    Args:
        config: The model.
        tokens: Length of the sequence; None takes the longest that the file names (``max_position_embeddings``).
        dtype: Of the weights, as torch calls it; None takes the file's, and bf16 where it has none.

    Raises:
        ConfigError: The length is no number of tokens.
    """
    if tokens is not None and not 1 <= tokens <= LARGEST_SIZE:
        raise ConfigError(f"--context-length must be from 1 to {LARGEST_SIZE}, not {tokens}")
    named = str(dtype or config.said("dtype", "torch_dtype")).removeprefix("torch.")
    name = named if named in _DTYPES else "bfloat16"
    longest = config.said("max_position_embeddings")
    usable = isinstance(longest, int) and not isinstance(longest, bool) and 1 <= longest <= LARGEST_SIZE
    width = ITEM_BYTES[_DTYPES[name]]
    geometries = [config.layer_geometry(layer) for layer in config.recurrent_layers]
    tails = sum(geometry.state_bytes // STATE_BYTES - geometry.elements for geometry in geometries)
    return SequenceMemory(
        dtype=name,
        state_bytes=STATE_BYTES * config.state_elements + width * tails,
        kv_bytes_per_token=None if config.kv_elements is None else width * config.kv_elements,
        tokens=tokens or (longest if usable else DEFAULT_TOKENS),
    )
