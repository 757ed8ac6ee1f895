"""Sliding window by state difference: each layer's state holds the last tokens alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from statex_dist.errors import ConfigError
from statex_dist.models.config import ModelConfig
from statex_dist.models.core.mitigation import Mitigation, Scanned, tokens_of_ssd, widened
from statex_dist.ops.mitigations import Scan, Tensors, windowed_gla, windowed_ssd


@dataclass(frozen=True, kw_only=True, slots=True)
class SlidingWindow(Mitigation):
    """Sliding window by state difference.

    Attributes:
        tokens: How many, the current one included.
    """

    NAME: ClassVar[str] = "sliding-window"
    EXAMPLE: ClassVar[str] = "sliding-window:tokens=2048"
    BACKEND: ClassVar[str] = "chunked"
    """It computes in full fp32. Tokens that leave the window are subtracted; a kernel may round them to tf32, and
    differently than when they entered."""

    tokens: int

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ConfigError(f"sliding-window: tokens must be 1 or more, not {self.tokens}")

    @property
    def num_tensors(self) -> int:
        """Number of tensors: the inputs and the decays of the last tokens, ``[S, tokens, ...]`` each."""
        return 3

    def check_model(self, config: ModelConfig) -> None:
        """Raise for a delta rule: an old token's part of its state depends on every later write."""
        if config.RECURRENCE == "delta_rule":
            raise ConfigError(
                f"sliding-window does not fit {config.MODEL_TYPE}: the delta rule erases as it writes, so that what "
                "tokens left in the state is no product of decays that could be subtracted; use forget-more or "
                "state-norm"
            )

    def gla(self, scan: Scan, inputs: Tensors, state: torch.Tensor | None, memory: Tensors) -> Scanned:
        """Subtract what left the window."""
        o, state, memory = windowed_gla(scan, widened(inputs), state, memory, width=self.tokens)
        return Scanned(o.to(inputs[2].dtype), state, memory)

    def ssd(self, scan: Scan, inputs: Tensors, state: torch.Tensor | None, memory: Tensors) -> Scanned:
        """Subtract what left the window."""
        x, dt, A, B, C = inputs
        tokens = widened((x, dt, B, C))
        y, state, memory = windowed_ssd(tokens_of_ssd(scan, A), tokens, A, state, memory, width=self.tokens)
        return Scanned(y.to(x.dtype), state, memory)
