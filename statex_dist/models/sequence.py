"""What a mixer needs to know of the sequences in a batch, and what it hands on to the next segment."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from statex_dist.parallel.context import ContextShare

LayerState = tuple[torch.Tensor, ...]
"""State of one layer after its last token: the recurrent matrix ``[S, H, ., .]``, then the convolutions' tails."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sequences:
    """How the tokens of a batch form sequences.

    Attributes:
        cu_seqlens: ``[S + 1]`` int32 borders of packed sequences (batch 1), or None: every row is one sequence.
        seq_idx: ``[1, T]`` int32, the same borders in mamba_ssm's form.
        output_states: Whether layers return their final states.
        backend: Scan implementation (``statex_dist.ops.dispatch.Backend``).
        chunk_size: Tokens per chunk of our own scans; None picks one.
        max_state_bytes: Bound of the chunk states that the scan of expanded GLA layers holds at once; None for its
            default.
        context: How the tokens hang together with those of other ranks, or None. States before and after the tokens
            are then those before and after the whole pack, ``[1, ...]``.
    """

    cu_seqlens: torch.Tensor | None = None
    seq_idx: torch.Tensor | None = None
    output_states: bool = False
    backend: str = "auto"
    chunk_size: int | None = None
    max_state_bytes: int | None = None
    context: ContextShare | None = None
