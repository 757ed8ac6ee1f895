"""Feeding a recurrent model segment by segment, so that memory does not grow with the context."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from statex_dist.errors import CheckpointError, ConfigError
from statex_dist.models.lm import RecurrentLM
from statex_dist.models.sequence import LayerState

DEFAULT_SEGMENT_LENGTH = 1024
"""Tokens per forward pass."""

MAX_LOGITS = 1 << 26
"""Logits held at once (256 MiB of fp32): a large vocabulary gets smaller batches and segments, not more memory."""


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


def check_segment_length(segment_length: int) -> None:
    """Raise unless ``segment_length`` is 1 or more.

    Raises:
        ConfigError: It is not.
    """
    if segment_length < 1:
        raise ConfigError(f"segment length must be 1 or more, not {segment_length}")


def check_finite(values: torch.Tensor, where: str) -> None:
    """Raise if a model's output is not finite.

    Raises:
        CheckpointError: ``values`` hold NaN or infinity; a score made of them would look like an honest zero.
    """
    if not torch.isfinite(values).all():
        raise CheckpointError(f"the model's output is NaN or infinite ({where}); its weights or its gates are damaged")


def prefill(
    model: RecurrentLM, input_ids: torch.Tensor, *, segment_length: int = DEFAULT_SEGMENT_LENGTH
) -> tuple[torch.Tensor, list[LayerState]]:
    """Read prompts segment by segment with a carried state.

    Args:
        model: The model.
        input_ids: ``[B, T]`` int64 prompts of equal length.
        segment_length: Tokens per forward pass.

    Returns:
        The logits ``[B, vocab]`` after the last token, and the states.
    """
    states: list[LayerState] | None = None
    logits: torch.Tensor | None = None
    for segment in input_ids.split(segment_length, dim=1):
        output = model(segment, states=states, output_states=True)
        states, logits = output.states, output.logits[:, -1]
    assert logits is not None
    assert states is not None
    return logits, states


def decode_greedily(
    model: RecurrentLM, input_ids: torch.Tensor, num_tokens: int, *, segment_length: int = DEFAULT_SEGMENT_LENGTH
) -> torch.Tensor:
    """Continue prompts with the most likely tokens, one recurrent step each.

    Args:
        model: The model.
        input_ids: ``[B, T]`` int64 prompts of equal length.
        num_tokens: Tokens to produce.
        segment_length: Tokens per forward pass while the prompt is read.

    Returns:
        ``[B, num_tokens]`` int64.

    Raises:
        CheckpointError: The logits are not finite.
    """
    logits, states = prefill(model, input_ids, segment_length=segment_length)
    produced: list[torch.Tensor] = []
    while True:
        check_finite(logits, f"after {input_ids.shape[1] + len(produced)} tokens")
        produced.append(logits.argmax(dim=-1))
        if len(produced) == num_tokens:
            return torch.stack(produced, dim=1)
        output = model(produced[-1][:, None], states=states, output_states=True)
        logits, states = output.logits[:, -1], output.states
