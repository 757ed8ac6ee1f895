"""How a family names its tensors: the vocabulary in which ``models/<family>/layout.py`` is written."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """Shape of one tensor and, where its rows are a concatenation, their parts.

    Attributes:
        shape: Full shape.
        parts: ``(name, rows)`` of each part along axis 0, in order; empty for a tensor of one piece.
        decay: Whether AdamW's weight decay applies (matrices yes; norms, biases, convolutions and dynamics no).
        trunk: Whether the matrix multiplies every token (embedding tables do not), for FLOP counts.
    """

    shape: tuple[int, ...]
    parts: tuple[tuple[str, int], ...] = ()
    decay: bool = True
    trunk: bool = True

    def __post_init__(self) -> None:
        assert not self.parts or sum(rows for _, rows in self.parts) == self.shape[0], self

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True, kw_only=True, slots=True)
class Names:
    """Where a family keeps what every language model has.

    Attributes:
        trunk: Attribute that holds embeddings, layers and final norm (``model`` or ``backbone``).
        final_norm: Name of the final norm inside the trunk.
        embedding: Name of the embedding table inside the trunk.
    """

    trunk: str
    final_norm: str
    embedding: str = "embeddings"

    @property
    def embeddings(self) -> str:
        """Full name of the embedding table's tensor."""
        return f"{self.trunk}.{self.embedding}.weight"

    @property
    def head(self) -> str:
        """Name of the output head's matrix."""
        return "lm_head.weight"

    def layer(self, index: int) -> str:
        """Return the prefix of a layer's tensors."""
        return f"{self.trunk}.layers.{index}."

    def split(self, name: str) -> tuple[int, str] | None:
        """Return ``(layer, suffix)`` of a layer's tensor, or None for a tensor outside the layers."""
        match = re.match(rf"{self.trunk}\.layers\.(\d+)\.(.+)$", name)
        return (int(match[1]), match[2]) if match else None

    def outside_layers(self, *, vocab_size: int, hidden_size: int, tied: bool) -> dict[str, TensorSpec]:
        """Return the specs of embeddings, final norm and (unless tied) head."""
        specs = {
            self.embeddings: TensorSpec(shape=(vocab_size, hidden_size), trunk=tied),
            f"{self.trunk}.{self.final_norm}.weight": TensorSpec(shape=(hidden_size,), decay=False),
        }
        if not tied:
            specs[self.head] = TensorSpec(shape=(vocab_size, hidden_size))
        return specs
