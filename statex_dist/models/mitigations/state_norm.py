"""State normalisation: the Frobenius norm of each head's state is kept to a limit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from statex_dist.errors import ConfigError
from statex_dist.models.core.mitigation import Mitigation, Scanned, tokens_of_ssd
from statex_dist.ops.mitigations import Scan, Tensors, limit_norm, limit_or_learn_norm, scan_in_pieces


@dataclass(frozen=True, kw_only=True, slots=True)
class StateNorm(Mitigation):
    """State normalisation.

    Attributes:
        limit: The largest norm; one number for all heads of all layers.
        learn: In place of ``limit``: each head's limit is the largest norm that its state had within this number of
            first tokens of the text. The training length is the natural choice.
        every: Tokens of a text after which states are scaled down to the limit. 1 is exact and slow. The end of a
            forward pass's tokens counts as well, so decoding is exact for every value.
    """

    NAME: ClassVar[str] = "state-norm"
    EXAMPLE: ClassVar[str] = "state-norm:learn=2048,every=64"
    WHOLE_STATES: ClassVar[bool] = True

    limit: float | None = None
    learn: int | None = None
    every: int = 64

    def __post_init__(self) -> None:
        if (self.limit is None) == (self.learn is None):
            raise ConfigError(
                "state-norm takes either limit (the largest norm of a head's state) or learn (tokens of a text, such "
                "as the training length, within which each head's largest norm becomes its limit); "
                f"for example {self.EXAMPLE}"
            )
        if self.limit is not None and not (math.isfinite(self.limit) and self.limit > 0):
            raise ConfigError(f"state-norm: limit must be above 0, not {self.limit}")
        if self.every < 1:
            raise ConfigError(f"state-norm: every must be 1 or more, not {self.every}")
        if self.learn is not None and self.learn < self.every:
            raise ConfigError(
                f"state-norm: learn={self.learn} must be at least every={self.every}: norms are measured every so "
                "many tokens"
            )

    @property
    def num_tensors(self) -> int:
        """Learned limits ``[S, H]`` and the tokens read ``[S]``; nothing with a given limit."""
        return 0 if self.learn is None else 2

    def check_segments(self, segment_length: int) -> None:
        """Raise unless segments end where states are brought back to the limit anyway."""
        if segment_length % self.every:
            raise ConfigError(
                f"state-norm: segments of {segment_length} tokens are no multiple of every={self.every}; change either"
            )

    def gla(self, scan: Scan, inputs: Tensors, state: torch.Tensor | None, memory: Tensors) -> Scanned:
        """Scan pieces of ``every`` tokens."""
        limit, learn = self.limit, self.learn
        if learn is None:
            assert limit is not None

            def bounded(after: torch.Tensor, num_tokens: int) -> torch.Tensor:
                return limit_norm(after, limit)

            return Scanned(*scan_in_pieces(scan, inputs, state, every=self.every, after_piece=bounded), ())
        kept = memory

        def learned(after: torch.Tensor, num_tokens: int) -> torch.Tensor:
            nonlocal kept
            limits, count = kept or (after.new_zeros(after.shape[:2]), after.new_zeros(len(after), dtype=torch.int64))
            count = count + num_tokens
            after, limits = limit_or_learn_norm(after, limits, count, learn_tokens=learn)
            kept = (limits, count)
            return after

        o, state = scan_in_pieces(scan, inputs, state, every=self.every, after_piece=learned)
        return Scanned(o, state, kept)

    def delta_rule(self, scan: Scan, inputs: Tensors, state: torch.Tensor | None, memory: Tensors) -> Scanned:
        """Scan pieces of ``every`` tokens."""
        return self.gla(scan, inputs, state, memory)

    def ssd(self, scan: Scan, inputs: Tensors, state: torch.Tensor | None, memory: Tensors) -> Scanned:
        """Scan pieces of ``every`` tokens."""
        x, dt, A, B, C = inputs
        return self.gla(tokens_of_ssd(scan, A), (x, dt, B, C), state, memory)
