"""Reading prompts segment by segment with a carried state, so that memory does not grow with their length.

A recurrent state has no mask: a token that is read stays in it permanently. So rows of a batch are never padded while
they are read. They advance together to the end of the shortest row. This row leaves the batch with its own state, and
the others continue.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from statex_dist.errors import CheckpointError
from statex_dist.inference.rows import join_rows, take_rows
from statex_dist.models.core.sequences import LayerState
from statex_dist.models.lm import RecurrentLM


def explain_not_finite(
    model: RecurrentLM, input_ids: torch.Tensor, states: list[LayerState] | None, *, position: int = 0
) -> CheckpointError:
    """Return an error that names the layer and the position at which a model's numbers stop being finite.

    The model reads the segment again with a look at each of its parts, in the order in which they compute.

    Args:
        model: The model.
        input_ids: ``[B, T]`` int64, the segment whose output is not finite.
        states: Each layer's state before the segment, or None for zero.
        position: Position of the segment's first token.
    """
    found: list[tuple[str, int]] = []

    def look(name: str, module: nn.Module, inputs: object, output: object) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        assert isinstance(hidden, torch.Tensor)
        bad = ~torch.isfinite(hidden).all(dim=-1).all(dim=0)
        if bad.any():
            found.append((name, position + int(bad.nonzero()[0])))

    parts: list[tuple[str, nn.Module]] = [("the embeddings", model.embedding_table)]
    parts += [(f"layer {i}", layer) for i, layer in enumerate(model.layers)]
    final_norm = model.trunk.get_submodule(model.final_norm_name)
    parts += [("the final norm", final_norm), ("the head", model.lm_head)]
    hooks = [part.register_forward_hook(functools.partial(look, name)) for name, part in parts]
    try:
        after = model(input_ids, states=states, output_states=True).states
    finally:
        for hook in hooks:
            hook.remove()
    if (where := first_not_finite(model, states or [])) is not None:
        found.insert(0, (where, position - 1))
    elif not found and (where := first_not_finite(model, after)) is not None:
        found.append((where, position + input_ids.shape[1] - 1))
    return _error(f"first in {found[0][0]} at position {found[0][1]}" if found else "not where it is read again")


def explain_row(
    model: RecurrentLM,
    input_ids: torch.Tensor,
    states: Sequence[LayerState] | None,
    bad: torch.Tensor,
    positions: Sequence[int],
) -> CheckpointError:
    """Return :func:`explain_not_finite` of the first bad row alone: rows of a batch may stand at different positions.

    Args:
        model: The model.
        input_ids: ``[B, T]`` int64, the segment whose output is not finite.
        states: Each layer's state before the segment, or None for zero.
        bad: ``[B]`` bool, the rows whose output is not finite.
        positions: Position of each row's first token.
    """
    row = int(bad.nonzero()[0])
    before = None if states is None else take_rows(states, [row])
    return explain_not_finite(model, input_ids[row : row + 1], before, position=positions[row])


def explain_step(model: RecurrentLM, states: Sequence[LayerState], row: int, *, position: int) -> CheckpointError:
    """Return the error of one row after a step of one token, from the states after it: those before it may be gone.

    Args:
        model: The model.
        states: Each layer's state after the step.
        row: The row whose output is not finite.
        position: Position of the step's token.
    """
    where = first_not_finite(model, take_rows(states, [row])) or "the logits alone"
    return _error(f"first in {where} at position {position}")


def _error(where: str) -> CheckpointError:
    return CheckpointError(f"the model's output is NaN or infinite, {where}; its weights or its gates are damaged")


def first_not_finite(model: RecurrentLM, states: Sequence[LayerState]) -> str | None:
    """Return what the first of a model's states that holds NaN or infinity is called, or None if there is none."""
    if not states:
        return None
    # One answer for all layers: each by itself would wait for the device.
    finite = torch.stack([torch.stack([x.isfinite().all() for x in state]).all() for state in states])
    if finite.all():
        return None
    layer, kind = model.state_places[int((~finite).nonzero()[0])]
    return f"the keys and values of layer {layer}" if kind == "attention" else f"the state of layer {layer}"


DEFAULT_SEGMENT_LENGTH = 1024
"""Tokens per forward pass."""

MAX_LOGITS = 1 << 26
"""Logits held at once (256 MiB of fp32): a large vocabulary gets smaller batches and segments, not more memory."""

Tokens = Sequence[int]


@contextmanager
def evaluating(model: RecurrentLM) -> Iterator[None]:
    """Put ``model`` into evaluation mode without autograd, and back into its own mode afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)


def device_of(model: RecurrentLM) -> torch.device:
    """Return the device of a model's parameters (the CPU if it has none)."""
    parameter = next(model.parameters(), None)
    return parameter.device if parameter is not None else torch.device("cpu")


def rows_that_fit(model: RecurrentLM, tokens_per_row: int, wanted: int) -> int:
    """Return the batch size, at most ``wanted``, whose logits stay within :data:`MAX_LOGITS` (but at least 1)."""
    return max(1, min(wanted, MAX_LOGITS // (tokens_per_row * model.config.vocab_size)))


def prefill(
    model: RecurrentLM,
    input_ids: torch.Tensor,
    *,
    segment_length: int = DEFAULT_SEGMENT_LENGTH,
    states: list[LayerState] | None = None,
    position: int = 0,
) -> tuple[torch.Tensor, list[LayerState]]:
    """Read prompts segment by segment with a carried state; only the last token's logits are ever computed.

    Args:
        model: The model.
        input_ids: ``[B, T]`` int64 prompts of equal length.
        segment_length: Tokens per forward pass.
        states: Each layer's state before the prompts, or None for zero.
        position: Position of the first token, for messages.

    Returns:
        The logits ``[B, vocab]`` after the last token, and the states.

    Raises:
        CheckpointError: The logits are not finite; layer and position are named.
    """
    logits: torch.Tensor | None = None
    read = 0
    for segment in input_ids.split(segment_length, dim=1):
        output = model(segment, states=states, output_states=True, logits_to_keep=1)
        logits = output.logits[:, -1]
        # A value that is not finite in the last layer, from a segment's earlier tokens, reaches the logits a segment
        # late, or never. A single token has no earlier tokens. A check of all states after each token would cost a
        # third of decoding.
        looked_at = output.states if segment.shape[1] > 1 else []
        bad = not bool(torch.isfinite(logits).all()) or first_not_finite(model, looked_at) is not None
        if model.anywhere(bad):
            raise explain_not_finite(model, segment, states, position=position + read)
        states, read = output.states, read + segment.shape[1]
    assert logits is not None
    assert states is not None
    return logits, states


def read_contexts(
    model: RecurrentLM,
    contexts: Sequence[Tokens],
    *,
    segment_length: int,
    start: Sequence[LayerState] | None = None,
    position: int = 0,
) -> tuple[torch.Tensor, list[LayerState]]:
    """Read contexts of unequal length, each to its own last token.

    A forward pass ends wherever a row does, so a model whose result depends on where passes end
    (:meth:`~statex_dist.models.mitigation.Mitigation.check_segments`) gives a row other numbers in another batch.

    Args:
        model: The model.
        contexts: ``B`` contexts of one token or more.
        segment_length: Most tokens per forward pass.
        start: Each layer's state ``[1, ...]`` before all of them, left as it is, or None for zero.
        position: Position of a context's first token, for messages.

    Returns:
        Logits ``[B, vocab]`` after each context's last token, and the states there, ``[B, ...]``.
    """
    device = device_of(model)
    # The longest first: rows that end are always the last of the batch.
    order = sorted(range(len(contexts)), key=lambda i: len(contexts[i]), reverse=True)
    at, active = 0, len(order)
    states = None if start is None else take_rows(start, [0] * active)
    ended: list[tuple[torch.Tensor, list[LayerState]]] = []
    while active:
        end = len(contexts[order[active - 1]])
        ids = torch.tensor([list(contexts[i][at:end]) for i in order[:active]], device=device)
        logits, after = prefill(model, ids, segment_length=segment_length, states=states, position=position + at)
        at, rows = end, active
        while active and len(contexts[order[active - 1]]) == at:
            active -= 1
        if active < rows:
            ended.append((logits[active:], take_rows(after, slice(active, None))))
        states = take_rows(after, slice(active))
    ended.reverse()
    back = torch.tensor(np.argsort(order), device=device)
    joined = join_rows(*(part for _, part in ended))
    return torch.cat([part for part, _ in ended])[back], take_rows(joined, back)
