"""Forget more, remember less: every decay stronger, every insertion weaker."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from statex_dist.errors import ConfigError
from statex_dist.models.core.mitigation import Mitigation, Scanned
from statex_dist.ops.mitigations import Scan, Tensors, forget_more_delta, forget_more_gla, forget_more_ssd


@dataclass(frozen=True, kw_only=True, slots=True)
class ForgetMore(Mitigation):
    """Forget more, remember less.

    Attributes:
        decay: Subtracted from each log decay, per token.
        insert: Factor of the inserted input.
    """

    NAME: ClassVar[str] = "forget-more"
    EXAMPLE: ClassVar[str] = "forget-more:decay=1e-4,insert=0.75"
    TRAINS: ClassVar[bool] = True

    decay: float = 1e-4
    insert: float = 0.75

    def __post_init__(self) -> None:
        if not (math.isfinite(self.decay) and self.decay >= 0):
            raise ConfigError(f"forget-more: decay must be 0 or more, not {self.decay}")
        if not 0 < self.insert <= 1:
            raise ConfigError(f"forget-more: insert must be above 0 and at most 1, not {self.insert}")

    def gla(self, scan: Scan, inputs: Tensors, state: torch.Tensor | None, memory: Tensors) -> Scanned:
        """Insert less of each key."""
        q, k, v, g = inputs
        k, g = forget_more_gla(k, g, decay=self.decay, insert=self.insert)
        return Scanned(*scan((q, k, v, g), state), ())

    def delta_rule(self, scan: Scan, inputs: Tensors, state: torch.Tensor | None, memory: Tensors) -> Scanned:
        """Insert less of each value: a key erases as well."""
        q, k, v, g, beta = inputs
        v, g = forget_more_delta(v, g, decay=self.decay, insert=self.insert)
        return Scanned(*scan((q, k, v, g, beta), state), ())

    def ssd(self, scan: Scan, inputs: Tensors, state: torch.Tensor | None, memory: Tensors) -> Scanned:
        """Insert less of each input, and take longer steps."""
        x, dt, A, B, C = inputs
        x, dt, A = forget_more_ssd(x, dt, A, decay=self.decay, insert=self.insert)
        return Scanned(*scan((x, dt, A, B, C), state), ())
