"""Layers with softmax attention of our own in models of recurrent layers: their sizes, tensors and first values.

Two libraries have such models under their own names: flash-linear-attention (:mod:`statex_dist.models.fla`) and
mamba_ssm (:mod:`statex_dist.models.state_spaces`). Their attention layers are never expanded. The layers themselves are
in :mod:`statex_dist.models.core.attention`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from statex_dist.errors import CheckpointError, shown
from statex_dist.models.layout import TensorSpec, Units
from statex_dist.models.row_mapping import Distribution


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionSizes:
    """Sizes and options of an attention layer.

    Attributes:
        num_heads: Heads of queries.
        num_kv_heads: Heads of keys and values; equal groups of heads of queries share them.
        head_dim: Channels of a head.
        bias: Whether the projections of queries, keys and values have a bias.
        out_bias: Whether the output projection has one.
        rotary_dim: First channels of a head that are rotated by the position; 0 for none.
        rotary_base: Base of the frequencies.
        interleaved: Whether neighbouring channels are rotated as pairs, in place of the two halves.
        window: Tokens that each token sees, itself included; None for all.
        scale: Factor of the scores; None takes ``head_dim ** -0.5``.
        conv_kernel: Width of a convolution over queries, keys and values; 0 for none.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    bias: bool = False
    out_bias: bool = False
    rotary_dim: int = 0
    rotary_base: float = 10000.0
    interleaved: bool = False
    window: int | None = None
    scale: float | None = None
    conv_kernel: int = 0

    def check(self, where: str) -> None:
        """Raise unless the sizes fit together.

        Args:
            where: The part of the file that they are from, for the message.

        Raises:
            CheckpointError: They do not.
        """
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                f"{where}: {self.num_kv_heads} heads of keys do not divide {self.num_heads} heads of queries"
            )
        if self.rotary_dim % 2 or not 0 <= self.rotary_dim <= self.head_dim:
            raise CheckpointError(
                f"{where}: rotary positions need an even number of channels, at most the {self.head_dim} of a head, "
                f"not {self.rotary_dim}"
            )
        if not (math.isfinite(self.rotary_base) and self.rotary_base > 0):
            raise CheckpointError(f"{where}: the rotary base must be a number above 0, not {shown(self.rotary_base)}")

    @property
    def query_size(self) -> int:
        """Channels of all queries, and of the outputs."""
        return self.num_heads * self.head_dim

    @property
    def key_size(self) -> int:
        """Channels of all keys, and of all values."""
        return self.num_kv_heads * self.head_dim

    @property
    def parts(self) -> tuple[tuple[str, int], ...]:
        """Rows ``q | k | v`` of a projection of all three."""
        return (("q", self.query_size), ("k", self.key_size), ("v", self.key_size))

    @property
    def units(self) -> tuple[Units, ...]:
        """How tensor-parallel ranks share these rows: by whole heads."""
        return (Units(self.num_heads), Units(self.num_kv_heads), Units(self.num_kv_heads))


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionLayer:
    """An attention layer as the rest of the program sees it.

    Attributes:
        sizes: Its sizes and options.
        block: ``module:Class`` of the layer.
        tensors: Its tensors in the order of the built layer's parameters, by name without the layer's prefix.
        first_value: Takes such a name and a shape; returns the tensor's distribution in a fresh model.
    """

    sizes: AttentionSizes
    block: str
    tensors: dict[str, TensorSpec]
    first_value: Callable[[str, tuple[int, ...]], Distribution]

    @property
    def state_kinds(self) -> tuple[str, ...]:
        """Kinds of the states that the layer carries: keys and values, and the tail of a convolution."""
        return ("attention", "convolution") if self.sizes.conv_kernel else ("attention",)
