"""The packing strategies that ``data.packing`` names, one row each.

A strategy of your own is one file with a layout function and one call of :func:`register`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from statex_dist.data.packing.best_fit import best_fit
from statex_dist.data.packing.pieces import Pieces, concatenate, one_document
from statex_dist.errors import ConfigError

TAILS = ("pad", "split")


class LayOut(Protocol):
    """A pure function that lays spans into packs; every token of every span stands in exactly one piece."""

    def __call__(self, length: np.ndarray, seq_len: int, *, split_tails: bool, chained: bool) -> Pieces:
        """Return the pieces.

        Args:
            length: ``[spans]`` int64 above 0, tokens of each span, in shuffled order.
            seq_len: Tokens that a pack holds.
            split_tails: Cut further documents to fill what would be padding; only where ``"split"`` is in ``tails``.
            chained: States are carried over: the last piece of a cut span begins its pack.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class PackingStrategy:
    """A way to pack."""

    name: str
    lay_out: LayOut
    tails: tuple[str, ...] = ("pad",)


_STRATEGIES: dict[str, PackingStrategy] = {}


def register(strategy: PackingStrategy) -> None:
    """Make a strategy known to configurations, plans and ``statex data-stats``.

    Raises:
        ConfigError: Another one has its name, or one of its tails is none.
    """
    if _STRATEGIES.get(strategy.name, strategy) != strategy:
        raise ConfigError(f"there is a packing {strategy.name!r} already; give yours another name")
    if "pad" not in strategy.tails or not set(strategy.tails) <= set(TAILS):
        raise ConfigError(f"packing {strategy.name!r} has the tails {strategy.tails}; allowed: pad, or pad and split")
    _STRATEGIES[strategy.name] = strategy


register(PackingStrategy(name="best_fit", lay_out=best_fit, tails=TAILS))
register(PackingStrategy(name="concat", lay_out=concatenate))
register(PackingStrategy(name="one_document", lay_out=one_document))


def strategies() -> list[PackingStrategy]:
    """Return all strategies, in the order in which they were registered."""
    return list(_STRATEGIES.values())


def find_packing(name: str, tail: str = "pad", *, section: str = "") -> PackingStrategy:
    """Return the strategy of a name, which must take ``tail``; ``section`` stands before the names in messages.

    Raises:
        ConfigError: There is none of this name, or it does not take ``tail``.
    """
    if name not in _STRATEGIES:
        raise ConfigError(f"{section}packing is {name!r}; allowed: {', '.join(_STRATEGIES)}")
    if tail not in TAILS:
        raise ConfigError(f"{section}tail is {tail!r}; allowed: {', '.join(TAILS)}")
    if tail not in _STRATEGIES[name].tails:
        able = " or ".join(repr(one.name) for one in strategies() if tail in one.tails)
        raise ConfigError(f"{section}tail {tail!r} is for packing {able}, not {name!r}; leave it at 'pad'")
    return _STRATEGIES[name]
