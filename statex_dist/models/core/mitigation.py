"""The interface of a mitigation of state collapse: values that a user sets, checks, and a form of each recurrence.

A mitigation needs no training (arXiv 2410.07145, section 4.2). Each is one file below
:mod:`statex_dist.models.mitigations` and one line of :mod:`statex_dist.models.mitigation`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from statex_dist.errors import ConfigError
from statex_dist.models.config import ModelConfig
from statex_dist.ops.mitigations import Scan, Tensors

MITIGATIONS: dict[str, type[Mitigation]] = {}
"""Every mitigation by name."""


class Scanned(NamedTuple):
    """Outputs ``[B, T, ...]``, the state after them, and the mitigation's part of the layer's state."""

    outputs: torch.Tensor
    state: torch.Tensor | None
    memory: Tensors


@dataclass(frozen=True, kw_only=True, slots=True)
class Mitigation:
    """Base of the mitigations.

    ``str()`` gives the text form ``NAME:key=value,...``, every value written out.

    :meth:`gla`, :meth:`delta_rule` and :meth:`ssd` run a recurrence under the mitigation. Their ``scan`` is the plain
    one (shapes as in :mod:`statex_dist.ops`), ``state`` is the state before the inputs or None, and ``memory``
    is the mitigation's part of the layer's state, or empty.
    """

    NAME: ClassVar[str]
    EXAMPLE: ClassVar[str]
    TRAINS: ClassVar[bool] = False
    """Whether it fits training, packed sequences and context parallelism; else it is for evaluation."""
    WHOLE_STATES: ClassVar[bool] = False
    """Whether it needs all of a head's state in one process."""
    BACKEND: ClassVar[str] = "auto"
    """The scan to take where the caller asks for none."""

    @property
    def num_tensors(self) -> int:
        """How many tensors it adds to the end of a layer's state."""
        return 0

    def gla(self, scan: Scan, inputs: Tensors, state: torch.Tensor | None, memory: Tensors) -> Scanned:
        """Run gated linear attention over ``q, k, v, g``."""
        raise NotImplementedError

    def delta_rule(self, scan: Scan, inputs: Tensors, state: torch.Tensor | None, memory: Tensors) -> Scanned:
        """Run the delta rule over ``q, k, v, g, beta``."""
        raise NotImplementedError

    def ssd(self, scan: Scan, inputs: Tensors, state: torch.Tensor | None, memory: Tensors) -> Scanned:
        """Run the Mamba2 scan without its skip term over ``x, dt, A, B, C``."""
        raise NotImplementedError

    def check_model(self, config: ModelConfig) -> None:
        """Raise if the mitigation's equation does not hold for a model.

        Raises:
            ConfigError: It does not.
        """

    def check_call(self, *, training: bool, packed: bool) -> None:
        """Raise if the mitigation cannot be part of a forward pass.

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


def tokens_of_ssd(scan: Scan, A: torch.Tensor) -> Scan:
    """Return a Mamba2 scan over the inputs of each token, ``x, dt, B, C``."""

    def scan_tokens(tokens: Tensors, before: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        x, dt, B, C = tokens
        return scan((x, dt, A, B, C), before)

    return scan_tokens


def widened(inputs: Tensors) -> Tensors:
    """Return fp32 or float64: what leaves a window has to be what entered it, and bf16 rounds the two apart."""
    return tuple(y.to(torch.promote_types(y.dtype, torch.float32)) for y in inputs)
