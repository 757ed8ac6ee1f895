"""Throughput of a step, and model FLOPs utilisation: the share of the peak that the model's own arithmetic takes.

What activation checkpointing computes again does not count, so that the figure compares runs whatever they recompute
(arXiv 2204.02311, appendix B). On a device whose peak is not known there is no figure, and no guess.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from statex_dist.train.callback import Callback

if TYPE_CHECKING:
    import torch

    from statex_dist.batch import PackedBatch

# Dense 16-bit tensor-core peaks with fp32 accumulation, from the vendors' data sheets, in TFLOP/s. bf16 and fp16 have
# the same peak but on V100 and T4, which know only fp16. The first pattern that is found in the device's name decides.
_PEAK_TFLOPS = (
    (r"\bMIG\b", None),  # a slice of a GPU: how much of it is not in its peak
    (r"\bGB200\b", 2500.0),
    (r"\bB200\b", 2250.0),
    (r"\bGH200\b", 989.4),
    (r"\bH200 NVL\b", 835.5),
    (r"\bH200\b", 989.4),
    (r"\bH100 NVL\b", 835.5),
    (r"\bH100 PCIe\b", 756.5),
    (r"\bH[18]00\b", 989.4),
    (r"\bH20\b", 148.0),
    (r"\bA[18]00\b", 312.0),
    (r"\bA40\b", 149.7),
    (r"\bA30\b", 165.0),
    (r"\bA10G\b", 70.0),
    (r"\bA10\b", 125.0),
    (r"\bL40S\b", 362.1),
    (r"\bL40\b", 181.1),
    (r"\bL4\b", 121.0),
    (r"\bV100S\b", 130.0),
    (r"\bV100-PCIE\b", 112.0),
    (r"\bV100\b", 125.0),
    (r"\bT4\b", 65.0),
    (r"\bMI300X\b", 1307.4),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Utilisation:
    """Turns a throughput into a share of the peak.

    Attributes:
        flops_per_token: FLOPs of forward and backward for one token.
        peak_flops: Peak FLOP/s of all ranks together.
        flops_per_pair: FLOPs of attention, forward and backward, for a token and one that it reads.
    """

    flops_per_token: int
    peak_flops: float
    flops_per_pair: int = 0

    def share(self, tokens_per_s: float, pairs_per_token: float = 0.0) -> float:
        """Return the model FLOPs utilisation at a throughput, from 0 to 1.

        Args:
            tokens_per_s: Of all ranks.
            pairs_per_token: Mean number of tokens that a token's attention reads.
        """
        return (self.flops_per_token + self.flops_per_pair * pairs_per_token) * tokens_per_s / self.peak_flops


def pairs(pack: PackedBatch) -> int:
    """Return the pairs of a token and one that its attention reads: in its own document, up to itself.

    Tokens of a document that an earlier pack has are not counted; padding is counted, as its tokens are.
    """
    lengths = pack.cu_seqlens.diff().long()
    return int((lengths * (lengths + 1)).sum()) // 2


def peak_tflops(device_name: str) -> float | None:
    """Return the peak of a device in TFLOP/s by its name, or None where it is not known."""
    return next((peak for pattern, peak in _PEAK_TFLOPS if re.search(pattern, device_name)), None)


def utilisation(
    flops_per_token: int,
    *,
    device: torch.device,
    ranks: int,
    given_tflops: float | None = None,
    flops_per_pair: int = 0,
) -> Utilisation | None:
    """Return how to compute the utilisation, or None where the device's peak is not known.

    Args:
        flops_per_token: FLOPs of forward and backward for one token.
        device: Of this rank; the others are taken to be the same.
        ranks: All ranks.
        given_tflops: Peak of one device in TFLOP/s, in place of the one in our table.
        flops_per_pair: FLOPs of attention, forward and backward, for a token and one that it reads.
    """
    peak = given_tflops
    if peak is None and device.type == "cuda":
        import torch

        peak = peak_tflops(torch.cuda.get_device_name(device))
    if peak is None:
        return None
    return Utilisation(flops_per_token=flops_per_token, flops_per_pair=flops_per_pair, peak_flops=peak * 1e12 * ranks)


class Throughput(Callback):
    """Adds what a step took: ``tokens``, ``seconds``, ``tokens_per_s``, ``memory_bytes`` and ``mfu``.

    ``tokens`` are the positions of all packs, padding included (``best_fit`` pads little).

    Args:
        flops_per_token: FLOPs of forward and backward for one token.
        flops_per_pair: The same of attention, for a token and one that it reads, by the documents of this rank's packs.
        peak_tflops: Peak of one device in TFLOP/s, in place of the one in our table.
    """

    order = 40

    def __init__(self, *, flops_per_token: int, flops_per_pair: int = 0, peak_tflops: float | None = None):
        self._flops, self._pair_flops, self._peak = flops_per_token, flops_per_pair, peak_tflops
        self._since: float | None = None
        self._pack_tokens = 0
        self._pairs_per_token = 0.0
        self.utilisation: Utilisation | None = None

    def on_start(self) -> None:
        """Find out the peak of the device."""
        engine = self.run.engine
        self.utilisation = utilisation(
            self._flops,
            device=engine.device,
            ranks=engine.world_size,
            given_tflops=self._peak,
            flops_per_pair=self._pair_flops,
        )

    def pre_step(self, step: int, batch: Sequence[PackedBatch]) -> None:
        """Count tokens; the first step's time begins here, that of another where the one before was reported."""
        self._pack_tokens = batch[0].num_tokens  # all packs of a step have one length
        if self._pair_flops:
            self._pairs_per_token = sum(map(pairs, batch)) / (self._pack_tokens * len(batch))
        if self._since is None:
            self._since = time.perf_counter()

    def post_step(self, record: dict[str, Any]) -> None:
        """Add the figures."""
        assert self._since is not None
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        tokens = self._pack_tokens * self.run.engine.num_packs
        record |= {
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_s": tokens / seconds,
            "memory_bytes": self.run.engine.peak_memory(),
        }
        if self.utilisation is not None:
            record["mfu"] = self.utilisation.share(record["tokens_per_s"], self._pairs_per_token)
