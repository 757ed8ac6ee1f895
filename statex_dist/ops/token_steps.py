"""Token-by-token parts of all recurrences: the scan that is the oracle of every fast path, and steps of decoding.

The speed of decoding is that of reading and writing states. So a state is never held twice, and its three passes
(decay, insert, read) run block by block while a block lies in the cache. On a CPU, with 32 sequences of 4 MiB each,
that took a ninth of the time of three passes over all of them into new memory (the steps of the oracle, whose states
stay as they are and may have a gradient). On a GPU the whole state is one block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from statex_dist.ops.cu_seqlens import borders_of

_BLOCK_BYTES = 1 << 20
"""Of a state that a CPU works on at a time: about half of a core's second-level cache."""


def scan_tokens(
    step: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    tensors: Sequence[torch.Tensor],
    values: torch.Tensor,
    state_shape: tuple[int, ...],
    *,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a recurrence token by token, over each packed sequence by itself.

    Args:
        step: Takes the tensors of one token and the state; returns its output and the new state.
        tensors: ``[B, T, ...]`` each.
        values: The one of them whose shape the outputs have.
        state_shape: Of one sequence, without the batch.
        initial_state: ``[S, *state_shape]`` or None for zero.
        cu_seqlens: ``[S + 1]`` borders of packed sequences, or None.

    Returns:
        Outputs ``[B, T, ...]`` and final states ``[S, *state_shape]``, in fp32 (float64 for float64).
    """
    if cu_seqlens is not None:
        parts = []
        for i, (start, stop) in enumerate(borders_of(cu_seqlens)):
            sequence, initial = slice(start, stop), None if initial_state is None else initial_state[i : i + 1]
            rows = [x[:, sequence] for x in tensors]
            parts.append(
                scan_tokens(step, rows, values[:, sequence], state_shape, initial_state=initial, cu_seqlens=None)
            )
        return torch.cat([o for o, _ in parts], dim=1), torch.cat([state for _, state in parts])
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    if initial_state is None:
        state = values.new_zeros(len(values), *state_shape, dtype=wide)
    else:
        state = initial_state.to(wide)
    outputs = []
    # unbind, not indexing: the gradient of x[:, t] fills a full-size tensor with zeros for every t.
    for token in zip(*(x.unbind(1) for x in tensors), strict=True):
        output, state = step(*token, state)
        outputs.append(output)
    return torch.stack(outputs, dim=1) if outputs else values.new_zeros(values.shape), state


def step_in_blocks(
    step: Callable[..., torch.Tensor], state: torch.Tensor, inputs: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Advance a contiguous state ``[B, H, ., .]`` by one token in its own memory.

    Args:
        step: Takes some heads' states ``[n, ., .]``, which it overwrites, and their slices of ``inputs``; returns
            their outputs.
        state: Overwritten by the new one.
        inputs: ``[B * H, ...]`` each.

    Returns:
        The outputs of all heads, ``[B * H, ...]``.
    """
    heads = state.view(-1, *state.shape[2:])
    size = len(heads)
    if not state.is_cuda:
        size = max(1, _BLOCK_BYTES // max(1, heads[:1].numel() * heads.element_size()))
    blocks = [slice(start, start + size) for start in range(0, len(heads), size)]
    return torch.cat([step(heads[block], *(x[block] for x in inputs)) for block in blocks])
