"""Where a model's numbers stop being finite: the layer and the position, for an error that can be acted on."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import nn

from statex_dist.errors import CheckpointError
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

    trunk = model.trunk
    parts: list[tuple[str, nn.Module]] = [("the embeddings", trunk.embedding_table)]
    parts += [(f"layer {i}", layer) for i, layer in enumerate(trunk.layers)]
    parts += [("the final norm", trunk.get_submodule(trunk.final_norm_name)), ("the head", model.lm_head)]
    hooks = [part.register_forward_hook(functools.partial(look, name)) for name, part in parts]
    try:
        after = model(input_ids, states=states, output_states=True).states
    finally:
        for hook in hooks:
            hook.remove()
    if (layer := first_not_finite(states or [])) is not None:
        found.insert(0, (f"the state of layer {layer}", position - 1))
    elif not found and (layer := first_not_finite(after)) is not None:
        found.append((f"the state of layer {layer}", position + input_ids.shape[1] - 1))
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
    before = None if states is None else [tuple(tensor[row : row + 1] for tensor in state) for state in states]
    return explain_not_finite(model, input_ids[row : row + 1], before, position=positions[row])


def explain_step(states: Sequence[LayerState], row: int, *, position: int) -> CheckpointError:
    """Return the error of one row after a step of one token, from the states after it: those before it may be gone.

    Args:
        states: Each layer's state after the step.
        row: The row whose output is not finite.
        position: Position of the step's token.
    """
    layer = first_not_finite([tuple(part[row] for part in state) for state in states])
    where = "the logits alone" if layer is None else f"the state of layer {layer}"
    return _error(f"first in {where} at position {position}")


def _error(where: str) -> CheckpointError:
    return CheckpointError(f"the model's output is NaN or infinite, {where}; its weights or its gates are damaged")


def first_not_finite(states: Sequence[LayerState]) -> int | None:
    """Return the first layer whose state holds NaN or infinity."""
    if not states:
        return None
    # One answer for all layers: each by itself would wait for the device.
    finite = torch.stack([torch.stack([x.isfinite().all() for x in state]).all() for state in states])
    return None if finite.all() else int((~finite).nonzero()[0])
