"""The sequences in a batch as a mixer sees them, and the state that a layer passes to the next segment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from statex_dist.errors import ConfigError
from statex_dist.models.core.mitigation import Mitigation

if TYPE_CHECKING:
    from statex_dist.distributed.context_group import ContextShare

LayerState = tuple[torch.Tensor, ...]
"""State of one layer after its last token, the tensors of :class:`LayerParts` in their order, ``[S, ...]`` each. Zeros
are the state before a text."""


class LayerParts(NamedTuple):
    """The parts of a layer's state. Their order is that of stored prompt caches.

    Attributes:
        recurrent: The matrix state ``[S, H, ., .]``.
        position: Of each sequence's next token ``[S]``; None in a layer without positions.
        tail: The convolution's last inputs ``[S, D, W - 1]``; None in a layer without a convolution.
        memory: What a mitigation adds.
    """

    recurrent: torch.Tensor | None = None
    position: torch.Tensor | None = None
    tail: torch.Tensor | None = None
    memory: LayerState = ()

    @classmethod
    def split(
        cls, state: LayerState, mitigation: Mitigation | None, *, has_position: bool, has_tail: bool
    ) -> LayerParts:
        """Return the parts of a layer's state.

        Args:
            state: The state.
            mitigation: What the model is run under, or None.
            has_position: Whether the layer has a position.
            has_tail: Whether the layer has a convolution.

        Raises:
            ConfigError: The state was left by a model with another mitigation, or of another kind.
        """
        added = 0 if mitigation is None else mitigation.num_tensors
        if added and len(state) <= added:
            raise ConfigError(
                f"a layer's state of {len(state)} tensors holds nothing of {mitigation}: read the text from its "
                "start with the mitigation set"
            )
        own = 1 + has_position + has_tail
        if len(state) != own + added:
            raise ConfigError(
                f"a layer's state of {len(state)} tensors is not this layer's, which has {own}, and {added} of "
                f"mitigation {mitigation}: read the text from its start"
            )
        rest = iter(state)
        recurrent = next(rest)
        position = next(rest) if has_position else None
        tail = next(rest) if has_tail else None
        return cls(recurrent, position, tail, tuple(rest))

    def join(self) -> LayerState:
        """Return the parts that there are, in order."""
        return (*(part for part in (self.recurrent, self.position, self.tail) if part is not None), *self.memory)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sequences:
    """How the tokens of a batch form sequences.

    Attributes:
        cu_seqlens: ``[S + 1]`` int32 borders of packed sequences (batch 1), or None: every row is one sequence.
        seq_idx: ``[1, T]`` int32, the same borders in mamba_ssm's form.
        output_states: Whether layers return their final states.
        backend: Scan implementation (``statex_dist.ops.backends.Backend``).
        chunk_size: Tokens per chunk of our own scans; None picks one.
        max_state_bytes: Bound of the chunk states that the scan of expanded GLA layers holds at once; None for its
            default.
        context: How the tokens connect to those of other ranks, or None. States before and after the tokens
            are then those before and after the whole pack, ``[1, ...]``.
        mitigation: Mitigation of state collapse, or None.
        overwrite_states: Whether a step of one token may write new matrix states over those that it is given.
    """

    cu_seqlens: torch.Tensor | None = None
    seq_idx: torch.Tensor | None = None
    output_states: bool = False
    backend: str = "auto"
    chunk_size: int | None = None
    max_state_bytes: int | None = None
    context: ContextShare | None = None
    mitigation: Mitigation | None = None
    overwrite_states: bool = False

    def is_step(self, x: torch.Tensor) -> bool:
        """Return whether ``x [B, T, ...]`` is one token of each sequence, for which a recurrence takes its step."""
        return x.shape[1] == 1 and self.cu_seqlens is None

    @property
    def overwrites(self) -> bool:
        """Whether a step writes over the state before it; a mitigation may need that one as well."""
        return self.overwrite_states and self.mitigation is None

    @property
    def scan_returns_state(self) -> bool:
        """Whether a scan is to return its final state: for the caller, or for a mitigation that works on states."""
        return self.output_states or (self.mitigation is not None and not self.mitigation.TRAINS)

    @property
    def scan_backend(self) -> str:
        """The scan to ask for: where nothing else is, the mitigation may choose."""
        return self.mitigation.BACKEND if self.backend == "auto" and self.mitigation is not None else self.backend

    @property
    def scan_options(self) -> dict[str, Any]:
        """Arguments that scans take."""
        return {
            "cu_seqlens": self.cu_seqlens,
            "backend": self.scan_backend,
            "chunk_size": self.chunk_size,
            "context": self.context,
            "output_final_state": self.scan_returns_state,
        }
