"""Remedies against state collapse that need no training, as a user names them (arXiv 2410.07145, section 4.2).

The text form is ``NAME[:key=value,...]``, for example ``forget-more``, ``state-norm:limit=8,every=64`` or
``sliding-window:tokens=2048``. What each computes is in :mod:`statex_dist.ops.mitigations`; docs/mitigations.md says
when to take which.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

from statex_dist.errors import ConfigError
from statex_dist.models.config import ModelConfig
from statex_dist.models.delta_rule import DeltaRuleConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Mitigation:
    """Base of the remedies.

    ``str()`` gives the text form that :func:`parse_mitigation` reads, every value written out.
    """

    NAME: ClassVar[str]
    EXAMPLE: ClassVar[str]
    TRAINS: ClassVar[bool] = False
    """Whether the remedy fits training, packed sequences and context parallelism; else it is for evaluation."""

    @property
    def num_tensors(self) -> int:
        """How many tensors it adds to the end of a layer's state."""
        return 0

    def check_model(self, config: ModelConfig) -> None:
        """Raise if the remedy's equation does not hold for a model.

        Raises:
            ConfigError: It does not.
        """

    def check_call(self, *, training: bool, packed: bool) -> None:
        """Raise if the remedy cannot be part of a forward pass.

        Args:
            training: Whether the model is in training mode.
            packed: Whether the tokens are packed sequences or a rank's share of them.

        Raises:
            ConfigError: It cannot.
        """
        if self.TRAINS or not (training or packed):
            return
        what = "a model in training mode (call its eval())" if training else "packed sequences (give one text per row)"
        fitting = ", ".join(kind.NAME for kind in MITIGATIONS.values() if kind.TRAINS)
        raise ConfigError(f"{self.NAME} is for evaluation and decoding, not for {what}; {fitting} is for both")

    def check_segments(self, segment_length: int) -> None:
        """Raise if results would depend on how a text is cut into segments of ``segment_length`` tokens.

        Raises:
            ConfigError: They would.
        """

    def __str__(self) -> str:
        values = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        return f"{self.NAME}:" + ",".join(f"{name}={value}" for name, value in values if value is not None)


@dataclass(frozen=True, kw_only=True, slots=True)
class ForgetMore(Mitigation):
    """Forget more, remember less: every decay stronger, every insertion weaker.

    Attributes:
        decay: Taken from each log decay, per token.
        insert: Factor of what is inserted.
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


@dataclass(frozen=True, kw_only=True, slots=True)
class StateNorm(Mitigation):
    """State normalisation: the Frobenius norm of each head's state is kept to a limit.

    Attributes:
        limit: The largest norm; one number for all heads of all layers.
        learn: In place of ``limit``: each head's limit is the largest norm that its state had within so many first
            tokens of the text. The training length is the natural choice.
        every: Tokens of a text after which states are brought back to the limit. 1 is exact and slow. The end of what
            one forward pass is given counts as well, and so decoding is exact whatever this is.
    """

    NAME: ClassVar[str] = "state-norm"
    EXAMPLE: ClassVar[str] = "state-norm:learn=2048,every=64"

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


@dataclass(frozen=True, kw_only=True, slots=True)
class SlidingWindow(Mitigation):
    """Sliding window by state difference: each layer's state holds the last tokens alone.

    Attributes:
        tokens: How many, the current one included.
    """

    NAME: ClassVar[str] = "sliding-window"
    EXAMPLE: ClassVar[str] = "sliding-window:tokens=2048"

    tokens: int

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ConfigError(f"sliding-window: tokens must be 1 or more, not {self.tokens}")

    @property
    def num_tensors(self) -> int:
        """What the last tokens inserted and their decays, ``[S, tokens, ...]`` each."""
        return 3

    def check_model(self, config: ModelConfig) -> None:
        """Raise for a delta rule: what an old token left in the state depends on every write since."""
        if isinstance(config, DeltaRuleConfig):
            raise ConfigError(
                f"sliding-window does not fit {config.MODEL_TYPE}: the delta rule erases as it writes, so that what "
                "tokens left in the state is no product of decays that could be subtracted; use forget-more or "
                "state-norm"
            )


MITIGATIONS: dict[str, type[Mitigation]] = {kind.NAME: kind for kind in (ForgetMore, StateNorm, SlidingWindow)}


def parse_mitigation(text: str) -> Mitigation:
    """Return the remedy that ``NAME[:key=value,...]`` names.

    Raises:
        ConfigError: The name, a key or a value is not one; the message says which are.
    """
    name, _, rest = text.strip().partition(":")
    kind = MITIGATIONS.get(name.strip().replace("_", "-"))
    if kind is None:
        examples = ", ".join(known.EXAMPLE for known in MITIGATIONS.values())
        raise ConfigError(f"mitigation {name!r} is not one of {', '.join(MITIGATIONS)} (for example {examples})")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    values: dict[str, Any] = {}
    for part in rest.split(",") if rest.strip() else ():
        key, _, value = (piece.strip() for piece in part.partition("="))
        if key not in fields or key in values or not value:
            wrong = f"{key!r} twice" if key in values else repr(part)
            raise ConfigError(f"mitigation {kind.NAME}: {wrong}; write it like {kind.EXAMPLE}")
        number = int if "int" in str(fields[key].type) else float
        try:
            values[key] = number(value)
        except ValueError:
            raise ConfigError(
                f"mitigation {kind.NAME}: {key} must be {'a whole number' if number is int else 'a number'}, "
                f"not {value!r}"
            ) from None
    needed = [field.name for field in fields.values() if field.default is dataclasses.MISSING]
    if missing := [key for key in needed if key not in values]:
        raise ConfigError(f"mitigation {kind.NAME} needs {', '.join(missing)}; write it like {kind.EXAMPLE}")
    return kind(**values)
