"""Feeding a recurrent model segment by segment, so that memory does not grow with the context."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from statex_dist.data.tokenizer import Tokenizer
from statex_dist.errors import CheckpointError, ConfigError, DataError
from statex_dist.models.lm import RecurrentLM
from statex_dist.models.sequence import LayerState

log = logging.getLogger(__name__)

DEFAULT_SEGMENT_LENGTH = 1024
"""Tokens per forward pass."""

MAX_LOGITS = 1 << 26
"""Logits held at once (256 MiB of fp32): a large vocabulary gets smaller batches and segments, not more memory."""

Stop = Callable[[int, list[int]], bool]
"""Says whether a row needs no more tokens, given its index and what it has produced."""


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


def check_reading(settings: Any, *counts: str) -> None:
    """Raise unless the settings that all suites have make sense: ``batch_size``, ``segment_length`` and ``seed``.

    Args:
        settings: A suite's settings.
        counts: Further fields that must be 1 or more.

    Raises:
        ConfigError: One does not.
    """
    for name in (*counts, "batch_size"):
        if getattr(settings, name) < 1:
            raise ConfigError(f"{name} must be 1 or more, not {getattr(settings, name)}")
    if settings.segment_length < 1:
        raise ConfigError(f"segment length must be 1 or more, not {settings.segment_length}")
    if settings.seed < 0:
        raise ConfigError(f"seed must be 0 or more, not {settings.seed}")


def check_different(name: str, numbers: Sequence[int], *, least: int = 1) -> None:
    """Raise unless ``numbers``, called ``name``, are one or more different numbers of ``least`` or more.

    Raises:
        ConfigError: They are not.
    """
    if not numbers or min(numbers) < least or len(set(numbers)) != len(numbers):
        raise ConfigError(f"{name} must be different numbers of {least} or more, not {list(numbers)}")


def token_outside(token: int, vocab_size: int, what: str) -> DataError:
    """Return the error of text, called ``what``, that holds a token without an embedding."""
    return DataError(
        f"{what} holds token {token}, the model's vocabulary ends at {vocab_size - 1}; "
        "use the tokenizer that the model was trained with"
    )


def check_vocabulary(model: RecurrentLM, tokenizer: Tokenizer) -> None:
    """Raise if the tokenizer has ids that the model has no embedding for.

    Raises:
        ConfigError: It has.
    """
    ids, rows = tokenizer.vocab_size, model.config.vocab_size
    if ids > rows:
        raise ConfigError(
            f"tokenizer {tokenizer.spec!r} has ids up to {ids - 1}, the model's embedding ends at {rows - 1}; "
            "set --tokenizer to the one that the model was trained with"
        )


def doubt_tokenizer(model: RecurrentLM, tokenizer: Tokenizer) -> None:
    """Warn if the tokenizer leaves most of the model's embedding unused: it may be that of another model."""
    ids, rows = tokenizer.vocab_size, model.config.vocab_size
    if ids < rows // 2:
        log.warning("tokenizer %r has %d ids, the model's embedding %d: is it the model's?", tokenizer.spec, ids, rows)


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
    if (layer := _first_not_finite(states or [])) is not None:
        found.insert(0, (f"the state of layer {layer}", position - 1))
    elif not found and (layer := _first_not_finite(after)) is not None:
        found.append((f"the state of layer {layer}", position + input_ids.shape[1] - 1))
    where = (
        "not at the same place when read again" if not found else f"first in {found[0][0]} at position {found[0][1]}"
    )
    return CheckpointError(f"the model's output is NaN or infinite, {where}; its weights or its gates are damaged")


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


def _first_not_finite(states: Sequence[LayerState]) -> int | None:
    """Return the first layer whose state holds NaN or infinity."""
    if not states:
        return None
    # One answer for all layers: each by itself would wait for the device.
    finite = torch.stack([torch.stack([x.isfinite().all() for x in state]).all() for state in states])
    return None if finite.all() else int((~finite).nonzero()[0])


def prefill(
    model: RecurrentLM,
    input_ids: torch.Tensor,
    *,
    segment_length: int = DEFAULT_SEGMENT_LENGTH,
    states: list[LayerState] | None = None,
    position: int | Sequence[int] = 0,
) -> tuple[torch.Tensor, list[LayerState]]:
    """Read prompts segment by segment with a carried state; only the last token's logits are ever computed.

    Args:
        model: The model.
        input_ids: ``[B, T]`` int64 prompts of equal length.
        segment_length: Tokens per forward pass.
        states: Each layer's state before the prompts, or None for zero.
        position: Position of the first token, for messages; one for all rows, or one each.

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
        # What a segment's earlier tokens left in the last layer reaches logits a segment late, or never. A single token
        # has none before it, and looking through all states after each would cost a third of decoding.
        looked_at = output.states if segment.shape[1] > 1 else []
        if not torch.isfinite(logits).all() or _first_not_finite(looked_at) is not None:
            if isinstance(position, int):
                raise explain_not_finite(model, segment, states, position=position + read)
            parts = [logits, *(tensor for state in output.states for tensor in state)]
            bad = torch.stack([~part.flatten(1).isfinite().all(dim=1) for part in parts]).any(dim=0)
            raise explain_row(model, segment, states, bad, [first + read for first in position])
        states, read = output.states, read + segment.shape[1]
    assert logits is not None
    assert states is not None
    return logits, states


def decode_greedily(
    model: RecurrentLM,
    input_ids: torch.Tensor,
    num_tokens: int,
    *,
    segment_length: int = DEFAULT_SEGMENT_LENGTH,
    stop: Stop | None = None,
) -> torch.Tensor:
    """Continue prompts with the most likely tokens, one recurrent step each.

    Args:
        model: The model.
        input_ids: ``[B, T]`` int64 prompts of equal length.
        num_tokens: Tokens to produce.
        segment_length: Tokens per forward pass while the prompt is read.
        stop: Asked after each step about each row that it has not yet stopped; when all are, decoding ends.

    Returns:
        ``[B, n]`` int64, ``n <= num_tokens``; a row that was stopped before others holds further tokens behind.

    Raises:
        CheckpointError: The logits are not finite; layer and position are named.
    """
    length = input_ids.shape[1]
    logits, states = prefill(model, input_ids, segment_length=segment_length)
    produced = logits.argmax(dim=-1)[:, None]
    running = list(range(len(input_ids)))
    while produced.shape[1] < num_tokens:
        if stop is not None:
            texts = produced.tolist()
            running = [row for row in running if not stop(row, texts[row])]
            if not running:
                break
        logits, states = prefill(model, produced[:, -1:], states=states, position=length + produced.shape[1] - 1)
        produced = torch.cat([produced, logits.argmax(dim=-1)[:, None]], dim=1)
    return produced
