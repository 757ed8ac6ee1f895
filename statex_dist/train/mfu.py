"""Model FLOPs utilisation: what share of the hardware's peak the model's own arithmetic takes.

What activation checkpointing computes again does not count, so that the figure compares runs whatever they recompute
(arXiv 2204.02311, appendix B). On a device whose peak is not known there is no figure, and no guess.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

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
    """

    flops_per_token: int
    peak_flops: float

    def share(self, tokens_per_s: float) -> float:
        """Return the model FLOPs utilisation at a throughput, from 0 to 1."""
        return self.flops_per_token * tokens_per_s / self.peak_flops


def peak_tflops(device_name: str) -> float | None:
    """Return the peak of a device in TFLOP/s by its name, or None where it is not known."""
    return next((peak for pattern, peak in _PEAK_TFLOPS if re.search(pattern, device_name)), None)


def utilisation(
    flops_per_token: int, *, device: torch.device, ranks: int, given_tflops: float | None = None
) -> Utilisation | None:
    """Return how to compute the utilisation, or None where the device's peak is not known.

    Args:
        flops_per_token: FLOPs of forward and backward for one token.
        device: Of this rank; the others are taken to be the same.
        ranks: All ranks.
        given_tflops: Peak of one device in TFLOP/s, in place of the one in our table.
    """
    peak = given_tflops
    if peak is None and device.type == "cuda":
        import torch

        peak = peak_tflops(torch.cuda.get_device_name(device))
    return None if peak is None else Utilisation(flops_per_token=flops_per_token, peak_flops=peak * 1e12 * ranks)
