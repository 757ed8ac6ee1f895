"""Shape, size and cost of one layer's recurrent state.

Both families keep a matrix per head and read it with a query: GLA ``S [K, V]`` (arXiv 2312.06635), Mamba2 ``S [N, P]``
(arXiv 2405.21060). One value describes either, before and after an expansion. The memory limits of the GPU scan of
large GLA states (``ops/gla/triton``) are here because memory predictions use them too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from statex_dist.errors import ConfigError, shown

STATE_BYTES = 4
"""Recurrent states are carried in fp32 by every kernel that we use."""

LARGEST_PLAIN_HEAD = 256 * 512
"""Numbers of a head's state in GLA-1.3B. Our own GPU scan, whose memory is bounded, takes larger ones."""

CHUNK_SIZE = 256
"""Tokens per chunk of long sequences in that scan. Each writes and reads one state: longer ones need less traffic and
more arithmetic for the products inside a chunk."""
LARGEST_DELTA_KERNEL_KEYS = 256
"""Key channels of a head that fla-core's kernels of the delta rules take; with more the PyTorch form runs."""

MAX_STATE_BYTES = 256 * 2**20
"""Bytes of the chunk states that are held at once, those of the forward pass and their gradients together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureMap:
    """A fixed function of a head's keys (and queries) that gives the state further key channels.

    ``phi(x) = [x * roll(x, r) for r in rolls]`` over the ``K`` channels of a head (docs/method.md, section 7).

    Attributes:
        rolls: The rolls, each a block of ``K`` new channels; 0 gives the squares. A roll ``r`` and the roll ``K - r``
            give the same products, so a roll is at most ``(K - 1) // 2``.
        relu: Whether the products are those of ``relu(x)``.
        match_norm: Whether ``phi(x)`` is scaled to the norm of ``x``.
    """

    rolls: Sequence[int]
    relu: bool = False
    match_norm: bool = False

    def __post_init__(self) -> None:
        rolls = self.rolls
        if not isinstance(rolls, list | tuple) or not rolls:
            raise ConfigError(f"features.rolls must be a list of rolls such as [1, 2, 3], not {shown(rolls)}")
        if any(not isinstance(roll, int) or isinstance(roll, bool) or roll < 0 for roll in rolls):
            raise ConfigError(
                f"features.rolls must be whole numbers: 0 (the squares) or more, such as [1, 2, 3], not {shown(rolls)}"
            )
        if len(set(rolls)) != len(rolls):
            raise ConfigError(f"features.rolls must name each roll once, not {shown(rolls)}")
        for name in ("relu", "match_norm"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"features.{name} must be true or false, not {shown(getattr(self, name))}")
        object.__setattr__(self, "rolls", tuple(rolls))

    @classmethod
    def of_factor(cls, factor: int, key_dim: int, *, relu: bool = False, match_norm: bool = False) -> FeatureMap:
        """Return the map that multiplies ``key_dim`` channels by ``factor``: rolls 1, 2, ..., then the squares.

        Raises:
            ConfigError: There are fewer independent products.
        """
        most = largest_roll(key_dim)
        if not 2 <= factor <= most + 2:
            raise ConfigError(
                f"factor {shown(factor)} of op grow_features must be 2 to {most + 2}: {key_dim} key channels have "
                f"{most} independent rolls and the squares"
            )
        rolls = [*range(1, min(factor - 1, most) + 1), *([0] if factor == most + 2 else [])]
        return cls(rolls=rolls, relu=relu, match_norm=match_norm)

    @property
    def factor(self) -> int:
        """Key channels that a head stores for each projected one."""
        return 1 + len(self.rolls)

    @property
    def summary(self) -> str:
        """The map in the short form of tables and messages: ``rolls 1-3,0 relu match_norm``."""
        spans: list[list[int]] = []
        for roll in self.rolls:
            if spans and roll == spans[-1][-1] + 1:
                spans[-1] = [spans[-1][0], roll]
            else:
                spans.append([roll])
        rolls = ",".join("-".join(map(str, span)) for span in spans)
        return " ".join([f"rolls {rolls}", *(name for name in ("relu", "match_norm") if getattr(self, name))])

    def to_dict(self) -> dict[str, Any]:
        """Return the form stored in ``config.json``."""
        return {**asdict(self), "rolls": list(self.rolls)}


def largest_roll(key_dim: int) -> int:
    """Return the largest roll whose products no smaller roll gives too."""
    return (key_dim - 1) // 2


@dataclass(frozen=True, kw_only=True, slots=True)
class StateGeometry:
    """The recurrent state of one layer.

    Attributes:
        num_heads: Independent recurrences.
        key_dim: Rows of a head's state, the side that decays (GLA ``K``; Mamba2 ``d_state``), those of feature maps
            included.
        value_dim: Columns of a head's state for one value head (GLA ``V``; Mamba2 ``head_dim``).
        num_key_groups: Groups of heads that share keys and queries (GLA: every head its own; Mamba2: ``n_groups``).
        values_per_key: Value heads that each key head stores (the ``r`` of the mixing matrix; 1 without mixing).
        conv_channels: Channels of the causal convolutions, whose last inputs are state too.
        conv_kernel: Width of those convolutions; 0 without any.
        chunk_size: Tokens per chunk of the training scan, for the cost model only.
        features: The map that makes a part of the key channels of the others, or None.
    """

    num_heads: int
    key_dim: int
    value_dim: int
    num_key_groups: int
    values_per_key: int = 1
    conv_channels: int = 0
    conv_kernel: int = 0
    chunk_size: int = 64
    features: FeatureMap | None = None

    @property
    def projected_key_dim(self) -> int:
        """Key channels of a head that projections make; features are functions of them."""
        return self.key_dim // self.features.factor if self.features else self.key_dim

    @property
    def elements(self) -> int:
        """Numbers in the matrix states of the layer (convolution tails not counted, as in the papers)."""
        return self.num_heads * self.key_dim * self.value_dim * self.values_per_key

    @property
    def is_large(self) -> bool:
        """Whether a head's state is larger than those of GLA-1.3B."""
        return self.elements // self.num_heads > LARGEST_PLAIN_HEAD

    @property
    def state_bytes(self) -> int:
        """Bytes of one sequence's state: fp32 matrices and convolution tails."""
        tail = self.conv_channels * max(self.conv_kernel - 1, 0)
        return STATE_BYTES * (self.elements + tail)

    @property
    def scan_flops(self) -> int:
        """Forward FLOPs of the chunked scan for one token.

        ``4`` per state number (update and read-out, a multiplication and an addition each) plus the attention inside
        a chunk, ``2 C`` per key and per value channel.
        """
        keys = self.num_key_groups * self.key_dim
        values = self.num_heads * self.value_dim * self.values_per_key
        return 4 * self.elements + 2 * self.chunk_size * (keys + values)


def chunks_per_segment(num_chunks: int, state_bytes: int, max_state_bytes: int) -> int:
    """Return the number of chunks of a segment, whose states and gradients are held at once.

    One fp32 state is kept per segment. A segment has at least the square root of the number of chunks: the states that
    are kept for shorter segments would take more memory than the shorter segments save.

    Args:
        num_chunks: Chunks of the whole sequence, or of all packed ones.
        state_bytes: Bytes of one chunk's state.
        max_state_bytes: Limit of the states and gradients of a segment together.
    """
    return max(max_state_bytes // (2 * state_bytes), math.isqrt(num_chunks), 1)
