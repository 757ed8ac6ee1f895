"""The heads of a layer."""

from __future__ import annotations

from typing import Any


class WholeHeads:
    """The heads of a layer that one process has, all of them.

    Attributes:
        keys: Heads (or groups of heads) with queries and keys.
        decays: Heads with decays of their own.
        values: Value heads.
        key_dim: Key channels of a head.
        value_dim: Value channels of a head.
        key_channels: Those of all heads.
    """

    def __init__(self, geometry: Any):
        self.keys, self.key_dim, self.value_dim = (
            geometry.num_key_groups,
            geometry.projected_key_dim,
            geometry.value_dim,
        )
        self.decays = self.values = geometry.num_heads
        self.key_channels = slice(None)

    @classmethod
    def of(cls, geometry: Any) -> WholeHeads:
        """Return the heads of a layer whose state has this geometry."""
        return cls(geometry)


def no_shared_tensors(config: Any) -> dict[str, Any]:
    """Return the parameters that the layers share: none."""
    return {}


def no_shared_inputs(trunk: Any) -> list[Any]:
    """Return what shared parameters give each layer: nothing."""
    return []
