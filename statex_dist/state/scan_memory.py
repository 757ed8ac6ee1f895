"""Memory limits of the GPU scan of large GLA states (``ops/gla/triton``); memory predictions use them too."""

from __future__ import annotations

import math

CHUNK_SIZE = 256
"""Tokens per chunk of long sequences. Each chunk writes and reads one state: longer chunks need less memory traffic and
more arithmetic for the products inside a chunk."""
MAX_STATE_BYTES = 256 * 2**20
"""Bytes of the chunk states that are held at once, those of the forward pass and their gradients together."""


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
