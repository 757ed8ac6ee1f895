"""Memory of our GPU scan of large GLA states (``statex_dist/ops/gla/triton``): its bound, and what plans count."""

from __future__ import annotations

import math

CHUNK_SIZE = 256
"""Tokens per chunk of long sequences. A state is written and read per chunk: the longer the chunk the less traffic, and
the more the products inside it weigh."""
MAX_STATE_BYTES = 256 * 2**20
"""Chunk states held at once, those of the forward pass and their gradients together."""


def chunks_per_segment(num_chunks: int, state_bytes: int, max_state_bytes: int) -> int:
    """Return how many chunks' states and gradients are held at once.

    A state in fp32 is kept for every segment of so many chunks: with fewer than the square root of all, these would
    take more than the shorter segment saves.

    Args:
        num_chunks: Chunks of the whole sequence, or of all packed ones.
        state_bytes: Of one chunk's state.
        max_state_bytes: Bound of both together.
    """
    return max(max_state_bytes // (2 * state_bytes), math.isqrt(num_chunks), 1)
