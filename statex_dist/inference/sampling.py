"""How the next token is chosen: the most likely one, or drawn with temperature, top-k and top-p, row by row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from statex_dist.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How a continuation is drawn.

    Attributes:
        max_tokens: Tokens at most.
        until: Strings that end a continuation and are no part of it. EOS always does, unless ``ignore_eos``.
        temperature: 0 takes the most likely token.
        top_k: Draw from the so many most likely tokens only; 0 for all.
        top_p: Draw from the fewest tokens whose probability is at least this (arXiv 1904.09751).
        ignore_eos: Whether a continuation goes on behind EOS, always to ``max_tokens`` (for measurements).
    """

    max_tokens: int
    until: tuple[str, ...] = ()
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens must be 1 or more, not {self.max_tokens}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0 and self.top_k >= 0 and 0 < self.top_p <= 1):
            raise ConfigError(
                f"temperature {self.temperature:g}, top_k {self.top_k} and top_p {self.top_p:g} make no sampling; "
                "allowed: temperature and top_k of 0 or more, top_p above 0 and at most 1"
            )
        if "" in self.until:
            raise ConfigError("a stop string is empty; give one character or more")


def choose_tokens(
    logits: torch.Tensor, samplings: Sequence[Sampling], generators: Sequence[np.random.Generator]
) -> torch.Tensor:
    """Return each row's next token, ``[B]`` int64 on the device of ``logits [B, vocab]``.

    Args:
        logits: ``[B, vocab]``, finite.
        samplings: How each row is drawn.
        generators: Each row's own: what it draws does not depend on the rows beside it.
    """
    chosen = logits.argmax(dim=-1)
    drawn = [row for row, sampling in enumerate(samplings) if sampling.temperature > 0]
    if drawn:
        rows = torch.tensor(drawn, device=logits.device)
        chosen[rows] = _draw(logits[rows], [samplings[row] for row in drawn], [generators[row] for row in drawn])
    return chosen


def _draw(
    logits: torch.Tensor, samplings: Sequence[Sampling], generators: Sequence[np.random.Generator]
) -> torch.Tensor:
    """Draw one token a row, in float64: a small top-p share of a large vocabulary is lost in fp32."""

    def column(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]

    # From the largest down: a tiny temperature then makes the others -inf, and never one infinite and all the rest NaN.
    scaled = logits.double() - logits.amax(dim=-1, keepdim=True)
    scaled /= column([sampling.temperature for sampling in samplings])
    values, tokens = scaled.sort(dim=-1, descending=True, stable=True)
    kept = column([sampling.top_k or logits.shape[-1] for sampling in samplings])
    values = values.masked_fill(torch.arange(logits.shape[-1], device=logits.device) >= kept, -torch.inf)
    shares = values.softmax(dim=-1)
    # A token is left out where those before it have the wanted probability already.
    before = shares.cumsum(dim=-1) - shares
    shares = shares.masked_fill(before >= column([sampling.top_p for sampling in samplings]), 0.0)
    bounds = shares.cumsum(dim=-1) / shares.sum(dim=-1, keepdim=True)
    points = column([generator.random() for generator in generators])
    # Rounding may leave the last bound below 1: never go beyond the last token that has a share.
    last = (shares > 0).sum(dim=-1, keepdim=True) - 1
    places = torch.searchsorted(bounds, points, right=True).minimum(last)
    return tokens.gather(1, places)[:, 0]
