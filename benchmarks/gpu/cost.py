"""FLOPs and bytes of a scan: the cost model with which :mod:`benchmarks.gpu.scan` compares its times.

A scan in chunks of ``C`` tokens keeps a state of ``S`` numbers, reads keys of ``K`` and values of ``V`` channels (all
heads together) and computes, for every token,

- forward: the update and the read-out of the state, ``2 S`` FLOPs each, and the attention inside the chunk, a product
  of queries with keys and one with values, of which the causal half counts: ``C K`` and ``C V``;
- backward, which computes the states again: update, the gradient of the state, and through it those of queries, keys
  and values, ``2 S`` each; inside the chunk the attention again, its gradient through the values, and the gradients of
  values, queries and keys: ``3 C K + 2 C V``.

These are the operations that the algebra needs (arXiv 2312.06635, section 4; arXiv 2405.21060, section 6). Further
operations of an implementation, such as the upper half of a square or another evaluation of the gates, do not count:
they show as a lower share of the ceilings. Bytes are those of each implementation's own algorithm: every array that
passes through memory counts once per kernel that reads or writes it, and caches do not count (see the functions).

The predicted time is that of the slower ceiling, arithmetic or memory (a roofline), with the machine's own measured
ceilings.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.measure import Ceilings
from statex_dist.state.geometry import chunks_per_segment

FLA_CHUNK = 64
"""Tokens per chunk of fla's ``chunk_gla``: fixed in its code."""
MAMBA_CHUNK = 256
"""Tokens per chunk with which models call ``mamba_chunk_scan_combined``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """Shape of one layer's scan over a sequence; sizes are sums over all heads.

    Attributes:
        tokens: Length of the sequence.
        numbers: Elements of the state.
        keys: Channels of keys, and of queries.
        values: Channels of values, and of outputs.
        scores: Matrices of ``C x C`` that a chunk needs: one per head, or per group that shares keys.
        element: Bytes of one number of queries, keys and values.
        projected: Channels of ``keys`` that are inputs, where the others are their products; None for all.
    """

    tokens: int
    numbers: int
    keys: int
    values: int
    scores: int
    element: int = 2
    projected: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ScanCost:
    """FLOPs and bytes of a scan over a sequence.

    Attributes:
        flops: Of the forward and of the backward pass.
        bytes_moved: The same.
        state_bytes: Chunk states that a backward pass holds at once, their gradients included.
    """

    flops: tuple[float, float]
    bytes_moved: tuple[float, float]
    state_bytes: int

    @property
    def all_flops(self) -> float:
        """FLOPs of forward and backward."""
        return sum(self.flops)

    @property
    def all_bytes(self) -> float:
        """Bytes of forward and backward."""
        return sum(self.bytes_moved)

    def predicted_seconds(self, ceilings: Ceilings) -> float:
        """Return the least time of forward and backward that the ceilings allow; the two passes add up."""
        return sum(
            max(flops / ceilings.product_flops, moved / ceilings.copy_bytes)
            for flops, moved in zip(self.flops, self.bytes_moved, strict=True)
        )


def scan_flops(work: Work, chunk: int) -> tuple[float, float]:
    """Return the FLOPs of forward and backward over the whole sequence."""
    forward = 4 * work.numbers + chunk * (work.keys + work.values)
    backward = 10 * work.numbers + chunk * (3 * work.keys + 2 * work.values)
    return work.tokens * forward, work.tokens * backward


def batched_products(work: Work, chunk: int, max_state_bytes: int) -> ScanCost:
    """Return the cost of our path: gated queries and keys, batched products, an elementwise pass over the states.

    Chunk states have the inputs' precision. They are written by a product, read and written by the pass that carries
    them on, and read by a product; in the backward pass the same again, and their gradients likewise, read by two
    products, while the states are read once more for the gates' gradient. With features, the wide queries and keys of a
    segment pass through memory too, and in the backward pass their gradients.

    Args:
        work: The scan.
        chunk: Tokens per chunk.
        max_state_bytes: Bound of the states, and their gradients, that are held at once.
    """
    element, keys, values = work.element, work.keys, work.values
    states = element * work.numbers / chunk
    projected = keys if work.projected is None else work.projected
    inputs = element * (2 * projected + values) + 4 * projected
    gated = 2 * element * 2 * keys
    products = 0 if work.projected is None else 2 * element * 2 * keys  # queries and keys with them, written and read
    scores = 2 * element * work.scores * chunk
    forward = 4 * states + inputs + element * values + gated + products + scores
    partial = 2 * 4 * 2 * keys  # gradients of queries and keys from the states and from inside the chunk, added in fp32
    reads = 2 * element * 2 * values  # values and the output's gradient, for two more products each
    backward = 10 * states + 2 * inputs + element * values + gated + 2 * products + 2 * scores + partial + reads
    chunks = -(-work.tokens // chunk)
    one = element * work.numbers
    held = min(chunks, chunks_per_segment(chunks, one, max_state_bytes))
    segments = -(-chunks // held)
    kept = 4 * work.numbers * segments  # the fp32 state before each segment
    return ScanCost(
        flops=scan_flops(work, chunk),
        bytes_moved=(work.tokens * forward, work.tokens * backward),
        state_bytes=2 * one * held + kept,
    )


def chunk_gla(work: Work) -> ScanCost:
    """Return the cost of fla-core 0.6.0's ``chunk_gla``: states of every 64 tokens, in fp32 for the backward pass.

    The states' gradients are read by two kernels. Of the rest, cumulative decays are fp32 and read with queries and
    keys by each of four kernels in the forward and about ten in the backward pass.
    """
    element, chunk, tokens = work.element, FLA_CHUNK, work.tokens
    wide = 4 * work.numbers / chunk
    forward = 2 * element * work.numbers / chunk + (6 * element + 16) * work.keys + 3 * element * work.values
    backward = 5 * wide + (16 * element + 56) * work.keys + 7 * element * work.values
    return ScanCost(
        flops=scan_flops(work, chunk),
        bytes_moved=(tokens * forward, tokens * backward),
        state_bytes=2 * 4 * work.numbers * -(-tokens // chunk),
    )


def mamba_scan(work: Work, chunk: int = MAMBA_CHUNK) -> ScanCost:
    """Return the cost of ``mamba_chunk_scan_combined``: states in fp32 before the carry and in the inputs' type after.

    The backward pass computes them again, carries fp32 gradients of the same kind, and reads both once more. Both kinds
    of states are held at once while they are carried.
    """
    element, tokens = work.element, work.tokens
    states = (2 * 4 + 2 * element) * work.numbers / chunk
    inputs = element * (2 * work.values + 2 * 2 * work.keys) + 2 * 4 * work.scores * chunk
    forward = states + inputs + element * work.values
    backward = 2 * states + (4 + element) * work.numbers / chunk + 2 * inputs + 3 * element * work.values
    return ScanCost(
        flops=scan_flops(work, chunk),
        bytes_moved=(tokens * forward, tokens * backward),
        state_bytes=(4 + element) * work.numbers * -(-tokens // chunk),
    )
