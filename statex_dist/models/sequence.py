"""What a mixer needs to know of the sequences in a batch, and what it hands on to the next segment."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from statex_dist.distributed.context_group import ContextShare
from statex_dist.errors import ConfigError
from statex_dist.models.mitigation import Mitigation, SlidingWindow

LayerState = tuple[torch.Tensor, ...]
"""State of one layer after its last token, ``[S, ...]`` each: the recurrent matrix ``[S, H, ., .]``; what the family
carries beside it (a position, the convolutions' tails); what a mitigation adds. Zeros are the state before a text."""


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
        context: How the tokens hang together with those of other ranks, or None. States before and after the tokens
            are then those before and after the whole pack, ``[1, ...]``.
        mitigation: Remedy against state collapse, or None.
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

    @property
    def overwrites(self) -> bool:
        """Whether a step writes over the state before it; a remedy may need that one as well."""
        return self.overwrite_states and self.mitigation is None

    @property
    def scan_returns_state(self) -> bool:
        """Whether a scan is to return its final state: for the caller, or for a remedy that works on states."""
        return self.output_states or (self.mitigation is not None and not self.mitigation.TRAINS)

    @property
    def scan_backend(self) -> str:
        """The scan to ask for: where nothing else is, a sliding window takes the one that computes in full fp32.

        What leaves the window is subtracted, and a kernel may round it and what had entered to tf32, each in its way.
        """
        return "chunked" if self.backend == "auto" and isinstance(self.mitigation, SlidingWindow) else self.backend

    def split(self, state: LayerState | None) -> tuple[LayerState | None, LayerState]:
        """Return a layer's state without what the mitigation added to it, and that.

        Raises:
            ConfigError: The state was left by a model without this mitigation.
        """
        added = 0 if self.mitigation is None else self.mitigation.num_tensors
        if not state or not added:
            return state, ()
        if len(state) <= added:
            raise ConfigError(
                f"a layer's state of {len(state)} tensors holds nothing of {self.mitigation}: read the text from its "
                "start with the mitigation set"
            )
        return state[:-added], state[-added:]
